"""What this server has answered goes into the next request as it came."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from openai.types.chat import ChatCompletion
from openai.types.responses import Response as OpenAiResponse
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText
from vllm.entrypoints.generate.base.protocol import DeltaMessage, FunctionCall, ToolCall
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
    ChatMessage,
)
from vllm.entrypoints.openai.completion.protocol import CompletionResponse, CompletionResponseChoice
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
from vllm.entrypoints.openai.responses.utils import construct_input_messages
from vllm.entrypoints.serve.engine.protocol import UsageInfo

from flexgate.server.inference.openai import foreign
from flexgate.server.inference.request.items import read_input
from flexgate.server.inference.request.messages import read_messages

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
HELLO = {"role": "user", "content": "hello"}
CALL = ToolCall(id="call_1", function=FunctionCall(name="f", arguments="{}"))
FUNCTION_CALL = ResponseFunctionToolCall(
    type="function_call", id="fc_1", call_id="call_1", name="f", arguments="{}", status="completed"
)


def chat_answer(message: ChatMessage) -> ChatCompletionResponse:
    choice = ChatCompletionResponseChoice(index=0, message=message)
    return ChatCompletionResponse(model="tiny", choices=[choice], usage=UsageInfo())


def output_message(text: str) -> ResponseOutputMessage:
    part = ResponseOutputText(type="output_text", text=text, annotations=[])
    return ResponseOutputMessage(id="msg_1", type="message", role="assistant", status="completed", content=[part])


def responses_answer(*output: Any) -> ResponsesResponse:
    request = ResponsesRequest(input="hello")
    return ResponsesResponse.from_request(
        request, request.to_sampling_params(8, {}), "tiny", created_time=0, output=list(output), status="completed"
    )


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "message", [ChatMessage(role="assistant", content="hi"), ChatMessage(role="assistant", tool_calls=[CALL])]
)
async def test_a_chat_message_is_accepted_as_it_was_sent(
    client: httpx.AsyncClient, handler: Any, message: ChatMessage
) -> None:
    handler.result = lambda: chat_answer(message)
    answer = (await client.post(CHAT, json={"messages": [HELLO]})).json()
    said = answer["choices"][0]["message"]
    by_client = ChatCompletion.model_validate(answer).choices[0].message.to_dict()
    result = {"role": "tool", "tool_call_id": "call_1", "content": "done"}
    for back in (said, by_client):
        response = await client.post(CHAT, json={"messages": [HELLO, back, result]})
        assert response.status_code == 200, response.text
        kept = handler.seen[-1].messages[1]
        assert kept.get("content") == message.content
        assert [call["function"]["name"] for call in kept.get("tool_calls", ())] == [
            call.function.name for call in message.tool_calls
        ]


@pytest.mark.asyncio
@pytest.mark.parametrize("output", [output_message("hi"), FUNCTION_CALL])
async def test_responses_output_is_accepted_as_it_was_sent(
    client: httpx.AsyncClient, handler: Any, output: Any
) -> None:
    handler.result = lambda: responses_answer(output)
    answer = (await client.post(RESPONSES, json={"input": "hello"})).json()
    by_client = [item.to_dict() for item in OpenAiResponse.model_validate(answer).output]
    for back in (answer["output"], by_client):
        response = await client.post(RESPONSES, json={"input": [HELLO, *back, HELLO]})
        assert response.status_code == 200, response.text
    user, said, _ = construct_input_messages(request_input=handler.seen[-1].input)
    assert user == HELLO
    if isinstance(output, ResponseFunctionToolCall):
        assert said["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    else:
        assert said == {"role": "assistant", "content": "hi"}


def prompt_of(items: Any) -> list[dict[str, Any]]:
    """The messages that vLLM makes of Responses input."""
    request = ResponsesRequest.model_validate({"input": read_input(items)})
    return [dict(message) for message in construct_input_messages(request_input=request.input)]


def parts(*texts: str, kind: str) -> list[dict[str, str]]:
    return [{"type": kind, "text": text} for text in texts]


@pytest.mark.parametrize("type_", [{}, {"type": "message"}, {"type": None}])
def test_a_message_needs_no_type(type_: dict[str, Any]) -> None:
    said = {"role": "assistant", "content": parts("hi", kind="output_text"), **type_}
    assert prompt_of([{**HELLO, **type_}, said]) == [HELLO, {"role": "assistant", "content": "hi"}]


def test_no_part_of_an_assistants_message_is_lost() -> None:
    content = [*parts("one", "two", kind="output_text"), {"type": "refusal", "refusal": "three"}]
    assert prompt_of([{"role": "assistant", "content": content}]) == [
        {"role": "assistant", "content": "one\ntwo\nthree"}
    ]


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_the_output_of_a_function_may_be_text_parts(kind: str) -> None:
    output = {"type": "function_call_output", "call_id": "call_1", "output": parts("1", "2", kind=kind)}
    *_, result = prompt_of([FUNCTION_CALL.to_dict(), output])
    assert result == {"role": "tool", "tool_call_id": "call_1", "content": "1\n2"}


@pytest.mark.parametrize("kind", ["text", "input_text"])
def test_parts_of_a_users_message_are_read_by_either_name(kind: str) -> None:
    (message,) = prompt_of([{"role": "user", "content": parts("hi", kind=kind)}])
    assert [part["text"] for part in message["content"]] == ["hi"]


def test_unknown_fields_that_are_null_are_ignored_at_every_depth() -> None:
    extra = {"from_another_client": None}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}", **extra}, **extra}
    said = {"role": "assistant", "content": [{"type": "text", "text": "x", **extra}], "tool_calls": [call], **extra}
    assert "from_another_client" not in json.dumps(read_messages([said]))
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "x", **extra}], **extra},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", **extra},
        {"type": "function_call_output", "call_id": "c", "output": "x", **extra},
    ]
    assert "from_another_client" not in json.dumps(read_input(items))


@pytest.mark.asyncio
async def test_null_fields_of_the_extension_and_of_options_are_ignored(client: httpx.AsyncClient, handler: Any) -> None:
    handler.result = lambda: chat_answer(ChatMessage(role="assistant", content="hi"))
    extra = {"from_another_client": None}
    body = {
        "messages": [HELLO],
        "stream_options": None,
        "structured_outputs": {"json_object": True, **extra},
        "flexgate": {"experts": {"ignore": [], **extra}, "purpose": None, **extra},
    }
    assert (await client.post(CHAT, json=body)).status_code == 200


@pytest.mark.asyncio
async def test_null_fields_that_openai_does_not_have_are_not_sent(client: httpx.AsyncClient, handler: Any) -> None:
    handler.result = lambda: chat_answer(ChatMessage(role="assistant", content="hi"))
    answer = (await client.post(CHAT, json={"messages": [HELLO]})).json()
    choice = answer["choices"][0]
    assert choice.keys() == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"].keys() == {"role", "content", "refusal", "annotations", "audio", "function_call"}
    assert not foreign.FOREIGN & answer.keys()


@pytest.mark.asyncio
async def test_what_vllm_alone_has_is_sent_where_it_says_something(client: httpx.AsyncClient, handler: Any) -> None:
    choice = CompletionResponseChoice(index=0, text="hi", stop_reason="x", token_ids=[1])
    handler.result = lambda: CompletionResponse(model="tiny", choices=[choice], usage=UsageInfo())
    answer = (await client.post("/v1/completions", json={"prompt": "x"})).json()
    assert (answer["choices"][0]["stop_reason"], answer["choices"][0]["token_ids"]) == ("x", [1])


@pytest.mark.asyncio
async def test_a_stream_has_no_null_fields_that_openai_does_not_have(client: httpx.AsyncClient, handler: Any) -> None:
    text = 'a "reasoning":null b'
    delta = DeltaMessage(role="assistant", content=text, reasoning=None)
    choice = ChatCompletionResponseStreamChoice(index=0, delta=delta, finish_reason="stop", token_ids=None)
    chunk = ChatCompletionStreamResponse(model="tiny", choices=[choice], prompt_text=None)

    async def events() -> AsyncIterator[str]:
        yield f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"
        yield "data: [DONE]\n\n"

    handler.result = events
    response = await client.post(CHAT, json={"messages": [HELLO], "stream": True})
    sent = json.loads(response.text.split("\n\n")[0].removeprefix("data: "))
    assert not foreign.FOREIGN & (sent.keys() | sent["choices"][0].keys() | sent["choices"][0]["delta"].keys())
    assert sent["choices"][0]["delta"]["content"] == text


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ('{"reasoning":null,"token_ids":null,"a":1}', '{"a":1}'),
        ('{"a":null,"reasoning":null,"token_ids":null}', '{"a":null}'),
        ('{"reasoning":null}', "{}"),
        ('{"reasoning":"null","b":[{"metrics":null}]}', '{"reasoning":"null","b":[{}]}'),
    ],
)
def test_null_fields_are_cut_out_and_nothing_else(text: str, left: str) -> None:
    assert foreign.without_nulls(text) == left
