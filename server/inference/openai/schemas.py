"""Requests and responses of the inference routes, as the OpenAPI document describes it.

Bodies are checked field by field against `flexgate.server.inference.request.fields`; responses are vLLM's models, made
by its handlers, with the `flexgate` object. Nothing is validated with the models of this module.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from openai.types.responses import FunctionTool, ResponseFunctionToolCall, ResponseOutputMessage
from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.json_schema import SkipJsonSchema

from flexgate.policies.documents import Grade
from flexgate.server.engine.seam.openai import (
    ChatCompletionResponse,
    ChatCompletionStreamResponse,
    CompletionResponse,
    CompletionStreamResponse,
    DetokenizeResponse,
    ResponsesResponse,
    TokenizeResponse,
)
from flexgate.server.http.schemas import Reason, Shown, is_none
from flexgate.server.inference.request import fields
from flexgate.server.inference.request.extension import Extension
from flexgate.server.inference.request.values import Fate, Table

_Positive = Annotated[int, Field(ge=1)]


class ExpertShare(Shown):
    """One expert's part in a response. `tokens` counts positions where it was chosen in at least one layer.

    `grade` says what excluding it excludes. `delta_logprob`, where `counterfactual` was asked for, is by how much the
    response's log-probability is larger with it than without it; null if it took no part or cannot be left out.
    """

    id: str
    owner: str | None
    grade: Grade
    gate_mass: float
    share_ppm: int
    tokens: int
    delta_logprob: Annotated[float | None, Field(exclude_if=is_none)] = None


class Rescored(Shown):
    """How likely a response's tokens are under its gate, in nats, and what scoring took: passes, and tokens in all."""

    logprob: float
    passes: int
    tokens: int


class Attribution(Shown):
    """Which experts took part in a response, the largest part first.

    Positions that were read from the prefix cache, `cached_prompt_tokens` of them, count like computed ones. A prompt
    counts once for all its choices. `shared_expert` is there, and true, if the model has experts that no gate reaches,
    and `dense_layers` if it has so many layers without any: every token passes them, no unit has them, and no share
    counts them.
    """

    method: str
    cached_prompt_tokens: int
    experts: list[ExpertShare]
    shared_expert: Annotated[Literal[True] | None, Field(exclude_if=is_none)] = None
    dense_layers: Annotated[int | None, Field(exclude_if=is_none)] = None
    counterfactual: Annotated[Rescored | None, Field(exclude_if=is_none)] = None


class Credit(Shown):
    """What an agreement with an owner demands to be said of a response that these experts of its took part in."""

    owner: str
    credit: str
    experts: list[str]


class GateReport(Shown):
    """The gate of a response: which experts could take part, which could not and why, and which did.

    `credits` is there where an agreement demands a credit, and `max_tokens` where the request states no length and
    less than it could use was left of a budget: the most tokens that each choice could have.
    """

    decision_id: str
    policy_version: int
    weights_epoch: int
    allowed: list[str]
    max_tokens: Annotated[int | None, Field(exclude_if=is_none)] = None
    credits: Annotated[list[Credit] | None, Field(exclude_if=is_none)] = None
    excluded: Annotated[list[Reason] | None, Field(exclude_if=is_none)] = None
    attribution: Annotated[Attribution | None, Field(exclude_if=is_none)] = None


class _Served(BaseModel):
    """The fields that a plain response has beyond vLLM's, and those it drops."""

    flexgate: GateReport
    kv_transfer_params: SkipJsonSchema[None] = None
    ec_transfer_params: SkipJsonSchema[None] = None


class ChatCompletion(_Served, ChatCompletionResponse):
    """A response to a conversation."""


class ChatCompletionChunk(ChatCompletionStreamResponse):
    """A part of a streamed response; the last one that says anything has the `flexgate` object."""

    flexgate: Annotated[GateReport | None, Field(exclude_if=is_none)] = None


class Completion(_Served, CompletionResponse):
    """A continued text."""


class CompletionChunk(CompletionStreamResponse):
    """A part of a streamed text; the last one that says anything has the `flexgate` object."""

    flexgate: Annotated[GateReport | None, Field(exclude_if=is_none)] = None


class ModelResponse(_Served, ResponsesResponse):
    """A response, which is not stored. Tools are functions."""

    output: list[ResponseOutputMessage | ResponseFunctionToolCall]
    tools: list[FunctionTool]
    tool_choice: Any
    prompt: SkipJsonSchema[None] = None
    input_messages: SkipJsonSchema[None] = None
    output_messages: SkipJsonSchema[None] = None


class TokenIds(TokenizeResponse):
    """A text or conversation as token ids."""


class DetokenizedText(DetokenizeResponse):
    """Token ids as text."""


class ResponseEvent(BaseModel):
    """A streamed event, as OpenAI has them. The last one has the `response`, with the `flexgate` object."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int
    response: Annotated[ModelResponse | None, Field(exclude_if=is_none)] = None


class Model(Shown):
    """A name of the served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Shown):
    """The names of the served model."""

    object: Literal["list"] = "list"
    data: list[Model]


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: Any = None


_TYPES: Final[dict[str, Any]] = {
    "model": str,
    "messages": list[Message],
    "prompt": str | list[Any],
    "input": str | list[Any],
    "tokens": list[int],
    "stream": bool,
    "n": _Positive,
    "max_tokens": _Positive,
    "max_completion_tokens": _Positive,
    "temperature": float,
    "top_p": float,
    "min_p": float,
    "flexgate": Extension,
}


def _body(name: str, table: Table, *required: str) -> type[BaseModel]:
    """The fields that are honoured or ignored; all others are refused by name."""
    known = [field for field, rule in table.items() if rule.fate is not Fate.REFUSED]
    types: dict[str, Any] = {field: (_TYPES.get(field, Any), ... if field in required else None) for field in known}
    return create_model(name, __config__=ConfigDict(extra="forbid"), **types)


ChatBody: Final = _body("ChatBody", fields.CHAT, "messages")
CompletionBody: Final = _body("CompletionBody", fields.COMPLETION, "prompt")
ResponsesBody: Final = _body("ResponsesBody", fields.RESPONSES, "input")
TokenizeBody: Final = _body("TokenizeBody", {**fields.TOKENIZE_PROMPT, **fields.TOKENIZE_CHAT})
DetokenizeBody: Final = _body("DetokenizeBody", fields.DETOKENIZE, "tokens")
