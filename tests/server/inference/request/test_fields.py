"""Every field of vLLM's and OpenAI's request types has a fate."""

from __future__ import annotations

import dataclasses

import pytest
from openai.types import chat, responses
from openai.types import completion_create_params as completion_params
from openai.types.chat import chat_completion_message_function_tool_call as chat_call
from openai.types.chat import chat_completion_message_function_tool_call_param as chat_call_param
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as responses_params
from openai.types.responses import response_input_item_param as item_params
from pydantic import BaseModel
from vllm.entrypoints.generate.base.protocol import DeltaMessage, DeltaToolCall, FunctionCall, StreamOptions, ToolCall
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
    ChatMessage,
)
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.tokenize.protocol import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from vllm.renderers.chat_utils import CustomChatCompletionMessageParam
from vllm.sampling_params import StructuredOutputsParams

from flexgate.server.http.errors import Invalid
from flexgate.server.inference.request import fields
from flexgate.server.inference.request.values import Fate, Rule, keep_honoured

VLLM: dict[str, tuple[fields.Table, type[BaseModel]]] = {
    "chat": (fields.CHAT, ChatCompletionRequest),
    "completion": (fields.COMPLETION, CompletionRequest),
    "responses": (fields.RESPONSES, ResponsesRequest),
    "tokenize prompt": (fields.TOKENIZE_PROMPT, TokenizeCompletionRequest),
    "tokenize chat": (fields.TOKENIZE_CHAT, TokenizeChatRequest),
    "detokenize": (fields.DETOKENIZE, DetokenizeRequest),
    "stream options": (fields.STREAM_OPTIONS, StreamOptions),
}
OPENAI = {
    "chat": (fields.CHAT, chat_params.CompletionCreateParamsStreaming),
    "completion": (fields.COMPLETION, completion_params.CompletionCreateParamsStreaming),
    "responses": (fields.RESPONSES, responses_params.ResponseCreateParamsStreaming),
}
OURS = {"flexgate"}
# What stands inside of a request: as OpenAI takes it, as OpenAI sends it, as vLLM takes or sends it.
INSIDE: dict[str, tuple[fields.Table, tuple[type, ...]]] = {
    "message": (
        fields.MESSAGE,
        (
            chat.ChatCompletionDeveloperMessageParam,
            chat.ChatCompletionSystemMessageParam,
            chat.ChatCompletionUserMessageParam,
            chat.ChatCompletionAssistantMessageParam,
            chat.ChatCompletionToolMessageParam,
            chat.ChatCompletionFunctionMessageParam,
            chat.ChatCompletionMessage,
            CustomChatCompletionMessageParam,
            ChatMessage,
            DeltaMessage,
        ),
    ),
    "tool call": (
        fields.TOOL_CALL,
        (
            chat.ChatCompletionMessageFunctionToolCallParam,
            chat.ChatCompletionMessageCustomToolCallParam,
            chat.ChatCompletionMessageFunctionToolCall,
            ToolCall,
            DeltaToolCall,
        ),
    ),
    "called function": (fields.CALLED_FUNCTION, (chat_call_param.Function, chat_call.Function, FunctionCall)),
    "text part": (
        fields.TEXT_PART,
        (
            chat.ChatCompletionContentPartTextParam,
            responses.ResponseInputTextParam,
            responses.ResponseInputTextContentParam,
            responses.ResponseOutputTextParam,
            responses.ResponseOutputText,
        ),
    ),
    "refusal part": (
        fields.REFUSAL_PART,
        (
            chat.ChatCompletionContentPartRefusalParam,
            responses.ResponseOutputRefusalParam,
            responses.ResponseOutputRefusal,
        ),
    ),
    "message item": (
        fields.ITEM_MESSAGE,
        (
            responses.EasyInputMessageParam,
            item_params.Message,
            responses.ResponseOutputMessageParam,
            responses.ResponseOutputMessage,
        ),
    ),
    "function call": (
        fields.ITEM_CALL,
        (responses.ResponseFunctionToolCallParam, responses.ResponseFunctionToolCall),
    ),
    "function output": (fields.ITEM_OUTPUT, (item_params.FunctionCallOutput,)),
}


def fields_of(kind: type) -> set[str]:
    """As they stand in JSON, of a pydantic model or of a typed dictionary."""
    if issubclass(kind, BaseModel):
        return {field.alias or name for name, field in kind.model_fields.items()}
    return {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}


@pytest.mark.parametrize("name", VLLM)
def test_every_field_of_vllm_is_classified(name: str) -> None:
    table, model = VLLM[name]
    names = set(model.model_fields)
    names |= {field.alias for field in model.model_fields.values() if field.alias}
    assert not names - table.keys(), "classify these fields in server/inference/request/fields.py"


@pytest.mark.parametrize("name", OPENAI)
def test_every_field_of_openai_is_classified(name: str) -> None:
    table, params = OPENAI[name]
    assert not fields_of(params) - table.keys(), "classify these fields in server/inference/request/fields.py"


@pytest.mark.parametrize("name", INSIDE)
def test_every_field_inside_of_a_request_or_an_answer_is_classified(name: str) -> None:
    table, kinds = INSIDE[name]
    names = set().union(*map(fields_of, kinds))
    assert not names - table.keys(), "classify these fields in server/inference/request/fields.py"


def test_every_structured_output_option_is_classified() -> None:
    names = {field.name for field in dataclasses.fields(StructuredOutputsParams)}
    assert not names - fields.STRUCTURED_OUTPUTS.keys()


@pytest.mark.parametrize("name", VLLM)
def test_every_honoured_field_is_one_that_vllm_reads(name: str) -> None:
    table, model = VLLM[name]
    honoured = {name for name, rule in table.items() if rule.fate is Fate.HONOURED} - OURS
    assert not honoured - set(model.model_fields), "honoured, but nobody would honour it"


def test_batched_chat_offers_nothing_beyond_chat() -> None:
    """Its route is not served; a field that only it has would be new to us."""
    extra = set(BatchChatCompletionRequest.model_fields) - fields.CHAT.keys()
    assert extra == {"best_of", "guided_decoding_backend"}


@pytest.mark.parametrize(
    "name",
    [
        "vllm_xargs",
        "kv_transfer_params",
        "ec_transfer_params",
        "request_id",
        "session_id",
        "priority",
        "mm_processor_kwargs",
        "media_io_kwargs",
    ],
)
@pytest.mark.parametrize("table", [fields.CHAT, fields.COMPLETION, fields.RESPONSES])
def test_what_reaches_into_the_engine_is_refused(name: str, table: fields.Table) -> None:
    assert table[name].fate is Fate.REFUSED


@pytest.mark.parametrize(
    ("table", "name"),
    [
        (fields.CHAT, "use_beam_search"),
        (fields.COMPLETION, "use_beam_search"),
        (fields.COMPLETION, "prompt_embeds"),
        (fields.CHAT, "chat_template"),
        (fields.CHAT, "chat_template_kwargs"),
        (fields.RESPONSES, "chat_template_kwargs"),
        (fields.TOKENIZE_CHAT, "chat_template"),
        (fields.RESPONSES, "previous_response_id"),
        (fields.RESPONSES, "background"),
        (fields.CHAT, "logits_processors"),
    ],
)
def test_what_would_lose_the_gate_or_run_code_is_refused(table: fields.Table, name: str) -> None:
    assert table[name].fate is Fate.REFUSED


@pytest.mark.parametrize(
    "name",
    ["user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier"],
)
@pytest.mark.parametrize("table", [fields.CHAT, fields.COMPLETION, fields.RESPONSES])
def test_bookkeeping_fields_are_accepted_and_dropped(table: fields.Table, name: str) -> None:
    assert keep_honoured({name: "auto"}, table) == {}


def test_a_refused_field_is_dropped_when_it_asks_for_nothing() -> None:
    body = {"priority": 0, "use_beam_search": False, "vllm_xargs": None, "n": None}
    assert keep_honoured(body, fields.CHAT) == {}


@pytest.mark.parametrize("value", [False, 0.0, "0", 1, -1, [0]])
def test_a_value_is_neutral_only_with_its_very_type(value: object) -> None:
    assert not Rule(Fate.REFUSED, neutral=(0,)).accepts(value)


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(Invalid, match="'guided_json' is not a field") as refused:
        keep_honoured({"guided_json": "{}"}, fields.CHAT)
    assert (refused.value.param, refused.value.code) == ("guided_json", "unknown_parameter")


def test_an_unknown_field_that_is_null_is_ignored() -> None:
    assert keep_honoured({"reasoning_content": None, "n": 2}, fields.CHAT) == {"n": 2}


def test_a_long_unknown_name_is_not_repeated_whole() -> None:
    with pytest.raises(Invalid) as refused:
        keep_honoured({"x" * 5000: 1}, fields.CHAT)
    assert len(str(refused.value)) < 200
