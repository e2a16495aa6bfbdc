"""The path of a generating request, with handlers that stand for vLLM's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import httpx
import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import (
    CompletionRequest,
    CompletionResponse,
    CompletionResponseChoice,
)
from vllm.entrypoints.openai.responses.protocol import (
    ResponseCompletedEvent,
    ResponsesRequest,
    ResponsesResponse,
)
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.exceptions import GenerationError, QueueOverflowError, VLLMValidationError

from flexgate.policies.cache import DecisionCache
from flexgate.policies.errors import StoreUnavailable
from flexgate.policies.snapshot import Snapshot
from flexgate.server.engine.frontend.calls import CURRENT_CALL, ExpertUse, GatedCall
from flexgate.server.engine.protocol.endings import (
    GATE_EXPIRED,
    KEY_EXPIRED,
    KEY_REVOKED,
    NUMBERS_OVERFLOWED,
    POLICY_UNAVAILABLE,
    PROJECT_ARCHIVED,
    QUEUED_TOO_LONG,
)
from flexgate.server.http import auth
from flexgate.server.http.auth import WRONG_KEY, KeyExpired, KeyRevoked, KeyWrong, Unauthenticated
from flexgate.server.inference import generation
from flexgate.server.inference.enforcement import RunningRequests
from flexgate.server.inference.fair_queue import FairQueue
from flexgate.server.inference.openai.vllm_errors import ended_early
from flexgate.server.inference.pipeline import InferenceRequest

PATH = "/v1/completions"
Body = dict[str, Any]


def answer() -> CompletionResponse:
    return CompletionResponse(
        model="tiny",
        choices=[CompletionResponseChoice(index=0, text="hi")],
        usage=UsageInfo(),
        kv_transfer_params={"flexgate": [1, 2, 3]},
    )


@pytest.mark.asyncio
async def test_a_handler_gets_honoured_fields_and_the_gate(client: httpx.AsyncClient, handler: Any) -> None:
    handler.result = answer
    response = await client.post(
        PATH,
        json={
            "prompt": "x",
            "model": "alias",
            "n": 2,
            "user": "u",
            "cache_salt": "pepper",
            "flexgate": {"experts": {"ignore": ["news"]}},
        },
        headers={"x-vllm-priority": "-9", "x-data-parallel-rank": "3", "x-session-id": "s"},
    )
    assert response.status_code == 200
    (request,), (call,) = handler.seen, handler.calls
    assert isinstance(request, CompletionRequest)
    assert (request.n, request.user, request.cache_salt, request.priority) == (2, None, None, 0)
    assert not request.model_extra
    assert request.request_id == response.headers["x-request-id"].removeprefix("req_")
    assert call.client_salt == "pepper"
    assert isinstance(call, GatedCall)
    assert [ref.expert for ref in call.experts] == ["public"]
    assert call.tenant == "t"
    assert CURRENT_CALL.get() is None


@pytest.mark.asyncio
async def test_an_answer_has_the_object_the_headers_and_no_peer_fields(client: httpx.AsyncClient, handler: Any) -> None:
    handler.result = answer
    response = await client.post(PATH, json={"prompt": "x"})
    body = response.json()
    assert body["flexgate"]["allowed"] == ["public", "news"]
    assert body["flexgate"]["decision_id"].startswith("dec_")
    assert response.headers["x-flexgate-experts"] == "public,news"
    assert "kv_transfer_params" not in body
    assert "ec_transfer_params" not in body


@pytest.mark.asyncio
async def test_an_answer_that_used_an_excluded_expert_is_withheld(
    client: httpx.AsyncClient, handler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexgate.server.engine.frontend.calls import Attribution, GatedCall

    forbidden = Attribution((ExpertUse("math", 0.5, 1),), 0)
    monkeypatch.setattr(GatedCall, "attribution", lambda self: forbidden)
    handler.result = answer
    response = await client.post(PATH, json={"prompt": "x"})
    assert response.status_code == 500
    assert "choices" not in response.text


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("error", "status", "param"),
    [
        (VLLMValidationError("bad", parameter="top_p", value="secret"), 400, "top_p"),
        (ValueError("bad"), 400, None),
        (QueueOverflowError(), 503, None),
        (GenerationError(), 500, None),
        (RuntimeError("inside"), 500, None),
        (create_error_response("bad", param="prompt"), 400, "prompt"),
        (
            create_error_response("inside", status_code=__import__("http").HTTPStatus(500)),
            500,
            None,
        ),
    ],
)
async def test_vllms_errors_have_this_servers_shape(
    client: httpx.AsyncClient, handler: Any, error: Any, status: int, param: str | None
) -> None:
    handler.result = error
    response = await client.post(PATH, json={"prompt": "x"})
    assert response.status_code == status
    said = response.json()["error"]
    assert said.keys() == {"message", "type", "param", "code"}
    assert said["param"] == param
    assert said["code"] is None or isinstance(said["code"], str)
    assert "inside" not in said["message"]
    assert "secret" not in said["message"]


@pytest.mark.asyncio
async def test_a_constraint_that_cannot_be_met_is_the_callers_mistake(
    client: httpx.AsyncClient, handler: Any, services: Any
) -> None:
    handler.result = GenerationError()
    body = {"prompt": "x", "structured_outputs": {"grammar": "root ::="}}
    response = await client.post(PATH, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "structured_outputs")
    services.client.errored = True
    assert (await client.post(PATH, json=body)).status_code == 500


@pytest.mark.asyncio
async def test_a_gate_that_ended_meanwhile_is_told(client: httpx.AsyncClient, handler: Any) -> None:
    def expire() -> None:
        handler.calls[-1].failed = GATE_EXPIRED
        raise GenerationError

    handler.result = expire
    response = await client.post(PATH, json={"prompt": "x"})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "expert_permission_ended"


@pytest.mark.asyncio
@pytest.mark.parametrize(("reason", "again"), [(QUEUED_TOO_LONG, "60"), (POLICY_UNAVAILABLE, "1")])
async def test_who_waited_in_vain_is_told_when_to_try_again(
    client: httpx.AsyncClient, handler: Any, reason: str, again: str
) -> None:
    def wait() -> None:
        handler.calls[-1].failed = reason
        raise GenerationError

    handler.result = wait
    response = await client.post(PATH, json={"prompt": "x"})
    assert (response.status_code, response.headers["retry-after"]) == (503, again)
    assert response.json()["error"]["code"] == reason


@pytest.mark.asyncio
async def test_a_prompt_that_finds_the_queue_full_is_refused_before_its_stream_begins(
    client: httpx.AsyncClient, handler: Any, services: Any
) -> None:
    """As vLLM's handlers do, this one asks the engine before it answers."""
    services.queue = FairQueue(1, share=1.0, most_queued=1, seconds=9)
    running, waiting = (services.queue.enter("t", 1, 1) for _ in range(2))
    handler.result = lambda: handler.calls[-1].queue(1, 1)
    response = await client.post(PATH, json={"prompt": "x", "stream": True})
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert response.json()["error"]["type"] == "requests"
    for ticket in (running, waiting):
        ticket.close()
    assert (services.queue.free, services.queue.queued) == (1, 0)


@pytest.mark.asyncio
@pytest.mark.parametrize("stream", [False, True])
async def test_numbers_that_overflowed_are_told_and_not_to_be_tried_again(
    client: httpx.AsyncClient, handler: Any, stream: bool
) -> None:
    async def events() -> AsyncIterator[str]:
        handler.calls[-1].failed = NUMBERS_OVERFLOWED
        yield f"data: {json.dumps(create_error_response(GenerationError()).model_dump())}\n\n"
        yield "data: [DONE]\n\n"

    def overflow() -> Any:
        if stream:
            return events()
        handler.calls[-1].failed = NUMBERS_OVERFLOWED
        raise GenerationError

    handler.result = overflow
    body = {"prompt": "x", "stream": stream, "structured_outputs": {"regex": "a"}}
    response = await client.post(PATH, json=body)
    if stream:
        said = json.loads(response.text.split("\n\n")[0].removeprefix("data: "))["error"]
    else:
        assert (response.status_code, response.headers["x-should-retry"]) == (500, "false")
        said = response.json()["error"]
    assert (said["type"], said["code"], said["param"]) == ("server_error", "numbers_overflowed", None)


@pytest.mark.asyncio
async def test_a_stream_is_generated_under_its_call_and_closed(client: httpx.AsyncClient, handler: Any) -> None:
    seen: list[Any] = []

    async def events() -> AsyncIterator[str]:
        try:
            seen.append(CURRENT_CALL.get())
            yield 'data: {"choices":[{"index":0,"finish_reason":"stop"}]}\n\n'
            yield "data: [DONE]\n\n"
        finally:
            seen.append("closed")

    handler.result = events
    response = await client.post(PATH, json={"prompt": "x", "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    first = json.loads(response.text.split("\n\n")[0].removeprefix("data: "))
    assert first["flexgate"]["allowed"] == ["public", "news"]
    assert seen == [handler.calls[0], "closed"]
    assert CURRENT_CALL.get() is None


@pytest.mark.asyncio
async def test_an_error_in_a_stream_has_this_servers_shape(client: httpx.AsyncClient, handler: Any) -> None:
    error = json.dumps(create_error_response(RuntimeError("inside")).model_dump())

    async def events() -> AsyncIterator[str]:
        yield f"data: {error}\n\n"
        yield "data: [DONE]\n\n"

    handler.result = events
    response = await client.post(PATH, json={"prompt": "x", "stream": True})
    first = json.loads(response.text.split("\n\n")[0].removeprefix("data: "))
    assert first["error"].keys() == {"message", "type", "param", "code"}
    assert first["error"]["type"] == "server_error"
    assert "inside" not in response.text


@pytest.mark.asyncio
async def test_a_failed_responses_stream_ends_with_an_error_event(client: httpx.AsyncClient, handler: Any) -> None:
    async def events() -> AsyncIterator[Any]:
        raise GenerationError
        yield

    handler.result = events
    response = await client.post("/v1/responses", json={"input": "x", "stream": True})
    name, data = response.text.strip().split("\n")
    assert name == "event: error"
    payload = json.loads(data.removeprefix("data: "))
    assert (payload["type"], payload["code"]) == ("error", "internal_error")


@pytest.mark.asyncio
async def test_a_client_that_leaves_ends_generation(services: Any, handler: Any) -> None:
    from flexgate.server.lifecycle.app import build_app

    started, cancelled = asyncio.Event(), asyncio.Event()

    async def wait(request: Any, raw_request: Any = None) -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    services.handlers.completion.create_completion = wait
    body = b'{"prompt": "x"}'
    arrived: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    await arrived.put({"type": "http.request", "body": body, "more_body": False})
    scope = {
        "type": "http",
        "method": "POST",
        "path": PATH,
        "raw_path": PATH.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"authorization", b"Bearer sk-t")],
    }

    async def send(message: Any) -> None:
        pass

    task = asyncio.create_task(build_app(services)(scope, arrived.get, send))
    await asyncio.wait_for(started.wait(), 5)
    await arrived.put({"type": "http.disconnect"})
    await asyncio.wait_for(cancelled.wait(), 5)
    await asyncio.wait_for(task, 5)


@pytest.mark.asyncio
async def test_an_expert_that_has_just_gone_is_no_reason_to_serve_without_it(
    client: httpx.AsyncClient, services: Any, handler: Any
) -> None:
    del services.client.refs["news"]
    response = await client.post(PATH, json={"prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "experts_changing")
    assert not handler.seen


@pytest.mark.asyncio
async def test_tools_reach_the_handler_when_a_choice_can_be_kept(
    client: httpx.AsyncClient, handler: Any, services: Any
) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    body = {"messages": [{"role": "user", "content": "x"}], "tools": tools}
    named = {"type": "function", "function": {"name": "f"}}
    handler.result = ValueError("reached")
    for choice in ("required", "none", named):
        await client.post("/v1/chat/completions", json={**body, "tool_choice": choice})
    assert len(handler.seen) == 3
    services.limits = replace(services.limits, has_tool_parser=True)
    await client.post("/v1/chat/completions", json={**body, "tool_choice": "auto"})
    await client.post("/v1/chat/completions", json=body)
    assert len(handler.seen) == 5
    assert all(isinstance(request, ChatCompletionRequest) for request in handler.seen)


@pytest.mark.asyncio
@pytest.mark.parametrize("has_parser", [True, False])
async def test_forced_calls_are_not_left_to_a_parsers_own_format(
    client: httpx.AsyncClient, handler: Any, services: Any, has_parser: bool
) -> None:
    services.limits = replace(services.limits, has_tool_parser=has_parser)
    services.handlers.chat = services.handlers.responses = None
    handler.result = ValueError("reached")
    function = {"name": "f", "parameters": {"type": "object"}}
    chat = {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": function}]}
    spoken = {"input": "x", "tools": [{"type": "function", **function}]}
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        await client.post("/v1/chat/completions", json={**chat, "tool_choice": choice})
    for choice in ("required", {"type": "function", "name": "f"}):
        await client.post("/v1/responses", json={**spoken, "tool_choice": choice})
    assert len(handler.seen) == 4
    other = await client.post("/v1/responses", json={**spoken, "tool_choice": {"type": "allowed_tools"}})
    assert (other.status_code, other.json()["error"]["param"]) == (400, "tool_choice.type")


@pytest.mark.asyncio
async def test_a_stream_that_nobody_reads_any_more_is_closed(services: Any, handler: Any) -> None:
    """The client leaves while an event waits to be sent, not while one is waited for."""
    from flexgate.server.lifecycle.app import build_app

    closed, sending = asyncio.Event(), asyncio.Event()

    async def events() -> AsyncIterator[str]:
        try:
            while True:
                yield 'data: {"choices":[{"index":0,"finish_reason":null}]}\n\n'
        finally:
            closed.set()

    handler.result = events
    arrived: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    await arrived.put({"type": "http.request", "body": b'{"prompt": "x", "stream": true}'})

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            sending.set()
            await asyncio.sleep(60)

    scope = {
        "type": "http",
        "method": "POST",
        "path": PATH,
        "raw_path": PATH.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"authorization", b"Bearer sk-t")],
    }
    task = asyncio.create_task(build_app(services)(scope, arrived.get, send))
    await asyncio.wait_for(sending.wait(), 5)
    await arrived.put({"type": "http.disconnect"})
    await asyncio.wait_for(task, 5)
    assert closed.is_set()


TOO_LONG = VLLMValidationError("your prompt contains 9 input tokens", parameter="input_tokens", value=9)
LONG_TEXT = VLLMValidationError("your prompt contains 99 characters", parameter="input_text", value=99)
FILLED = VLLMValidationError("max_tokens must be at least 1, got 0.", parameter="max_tokens", value=0)
BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"prompt": "x"},
    "/v1/responses": {"input": "x"},
}


@pytest.mark.asyncio
@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("error", [TOO_LONG, LONG_TEXT, FILLED])
async def test_a_prompt_too_long_is_told_by_openais_code_and_the_requests_own_field(
    client: httpx.AsyncClient, handler: Any, path: str, error: Exception
) -> None:
    handler.result = error
    response = await client.post(path, json=BODIES[path])
    said = response.json()["error"]
    (field,) = BODIES[path]
    assert (response.status_code, said["code"], said["param"]) == (400, "context_length_exceeded", field)
    assert said["message"].startswith("The prompt is too long: ")  # LangChain looks for these words
    if error is FILLED:
        assert said["message"] == (
            f"The prompt is too long: '{field}' takes all tokens of this model's context: none is left for an answer. "
            "Shorten it by at least one token."
        )


def finish(index: int) -> str:
    choice = {"index": index, "text": "x", "finish_reason": "stop"}
    return f"data: {json.dumps({'id': 'c', 'choices': [choice]}, separators=(',', ':'))}\n\n"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("prompt", "choices"), [("x", 1), ([1, 2], 1), (["x", "y"], 2), ([[1, 2], [3]], 2), ([[1, 2]], 1)]
)
async def test_every_form_of_a_prompt_has_as_many_choices_as_vllm_answers(
    client: httpx.AsyncClient, handler: Any, prompt: Any, choices: int
) -> None:
    async def events() -> AsyncIterator[str]:
        for index in range(choices):
            yield finish(index)
        yield "data: [DONE]\n\n"

    handler.result = events
    response = await client.post(PATH, json={"prompt": prompt, "stream": True})
    *_, last, _, _ = response.text.split("\n\n")
    assert "flexgate" in json.loads(last.removeprefix("data: "))
    (request,) = handler.seen
    assert len(request.prompt) == choices


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([1.0, 2.0], "prompt[0]"),
        ([1.0] * 17, "prompt[0]"),
        ([1, 2.0], "prompt[0]"),
        (["x", 1], "prompt[1]"),
        ([[1], [2.0]], "prompt[1]"),
        ([True], "prompt[0]"),
        ([[]], "prompt[0]"),
        ({"a": 1}, "prompt"),
        (7, "prompt"),
    ],
)
async def test_a_prompt_of_no_known_form_is_refused_by_place(
    client: httpx.AsyncClient, handler: Any, prompt: Any, param: str
) -> None:
    response = await client.post(PATH, json={"prompt": prompt})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert not handler.seen


@pytest.mark.asyncio
async def test_options_of_a_stream_are_true_or_false(client: httpx.AsyncClient, handler: Any) -> None:
    body = {"prompt": "x", "stream": True, "stream_options": {"include_usage": "false"}}
    response = await client.post(PATH, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "stream_options.include_usage")


@pytest.mark.asyncio
@pytest.mark.parametrize("status", ["completed", "incomplete"])
async def test_a_responses_stream_ends_with_the_event_of_its_status(
    client: httpx.AsyncClient, handler: Any, status: Any
) -> None:
    request = ResponsesRequest(input="x")
    params = request.to_sampling_params(8, {})
    ended = ResponsesResponse.from_request(request, params, "tiny", created_time=0, output=[], status=status)

    async def events() -> AsyncIterator[Any]:
        yield ResponseCompletedEvent(type="response.completed", sequence_number=1, response=ended)

    handler.result = events
    response = await client.post("/v1/responses", json={"input": "x", "stream": True})
    name, data = response.text.strip().split("\n")
    assert name == f"event: response.{status}"
    payload = json.loads(data.removeprefix("data: "))
    assert (payload["type"], payload["response"]["status"]) == (f"response.{status}", status)
    assert payload["response"]["flexgate"]["allowed"] == ["public", "news"]


@pytest.mark.asyncio
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_several_choices_are_answered_at_temperature_0(
    client: httpx.AsyncClient, handler: Any, path: str
) -> None:
    handler.result = ValueError("reached")
    await client.post(path, json={**BODIES[path], "n": 3, "temperature": 0})
    (request,) = handler.seen
    params = request.to_sampling_params(8, {})
    assert (params.n, params.temperature, request.n) == (3, 0.0, 3)
    assert params.clone().n == 3


@pytest.mark.asyncio
async def test_usage_says_how_much_of_all_prompts_was_cached(client: httpx.AsyncClient, handler: Any) -> None:
    def cached() -> CompletionResponse:
        handler.calls[-1]._cached_tokens.update(a=3, b=4)
        return answer()

    handler.result = cached
    usage = (await client.post(PATH, json={"prompt": ["x", "y"]})).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 7}


@pytest.mark.asyncio
async def test_models_say_how_long_a_prompt_may_be(client: httpx.AsyncClient, services: Any) -> None:
    card = (await client.get("/v1/models/tiny")).json()
    assert card["max_model_len"] == services.limits.prompt_tokens


@pytest.mark.asyncio
async def test_a_policy_that_comes_between_its_admission_and_its_start_ends_a_request(
    client: httpx.AsyncClient, handler: Any, services: Any, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler.result = answer
    begin = services.running.begin

    def begin_after_the_newer_policy(*args: Any) -> None:
        store.answer = replace(store.answer, policy_version=8, agreements=MappingProxyType({}))
        services.policy.confirm()
        begin(*args)

    monkeypatch.setattr(services.running, "begin", begin_after_the_newer_policy)
    response = await client.post(PATH, json={"prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "expert_permission_ended")
    assert handler.seen == []


def between_authentication_and_decision(services: Any, monkeypatch: pytest.MonkeyPatch, newer: Snapshot) -> Body:
    """A body that waits for `newer`, which comes then."""
    at_least = services.policy.at_least

    async def after_it_came(version: int) -> Snapshot:
        services.policy._store.answer = newer
        services.policy.confirm()
        return await at_least(version)

    monkeypatch.setattr(services.policy, "at_least", after_it_came)
    return {"prompt": "x", "flexgate": {"min_policy_version": newer.policy_version}}


@pytest.mark.asyncio
async def test_a_key_that_is_revoked_before_the_decision_gets_no_gate_of_the_policy_that_revokes_it(
    client: httpx.AsyncClient, handler: Any, services: Any, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where requests that run may finish when their key goes."""
    handler.result = answer
    services.running = RunningRequests(
        services.client, clock=services.clock, policy=services.policy, revoked_keys="finish"
    )
    keys = {digest: replace(key, revoked=1.0) for digest, key in snapshot.keys.items()}
    newer = replace(snapshot, policy_version=8, keys=MappingProxyType(keys))
    response = await client.post(PATH, json=between_authentication_and_decision(services, monkeypatch, newer))
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    assert handler.seen == []


@pytest.mark.asyncio
async def test_key_and_gate_are_judged_by_one_version_of_the_policy_at_one_time(
    client: httpx.AsyncClient, handler: Any, services: Any, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[tuple[str, int, float]] = []
    really_recognise = auth.recognise

    def recognise(known: Snapshot, digest: bytes, now: float, roles: Any) -> Any:
        judged.append(("key", known.policy_version, now))
        return really_recognise(known, digest, now, roles)

    def decide(known: Snapshot, tenant: str, request: Any, now: float) -> Any:
        judged.append(("gate", known.policy_version, now))
        return DecisionCache().decide(known, tenant, request, now)

    monkeypatch.setattr("flexgate.server.http.auth.recognise", recognise)
    monkeypatch.setattr(services.decisions, "decide", decide)
    handler.result = answer
    newer = replace(snapshot, policy_version=8)
    response = await client.post(PATH, json=between_authentication_and_decision(services, monkeypatch, newer))
    (_, key_version, key_time), (_, gate_version, gate_time) = judged[-2:]
    assert [what for what, _, _ in judged[-2:]] == ["key", "gate"]
    assert (key_version, key_time) == (gate_version, gate_time)
    assert response.json()["flexgate"]["policy_version"] == gate_version == 8


@pytest.mark.asyncio
async def test_a_body_is_kept_no_longer_than_it_takes_to_validate_it(
    client: httpx.AsyncClient, handler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[InferenceRequest] = []
    monkeypatch.setattr(generation, "begin", begun.append)
    handler.result = answer
    await client.post(PATH, json={"prompt": "x", "metadata": [[]] * 10_000})
    assert [hasattr(request, "raw") for request in begun] == [False]
    assert "metadata" not in begun[0].body


@pytest.mark.asyncio
async def test_a_policy_that_cannot_be_confirmed_once_the_body_is_there_decides_nothing(
    client: httpx.AsyncClient, handler: Any, services: Any, store: Any
) -> None:
    async def content() -> AsyncIterator[bytes]:
        yield b'{"prompt": '
        store.answer = StoreUnavailable("away")
        services.policy._confirmed = -float("inf")
        services.policy._lease_s = 0.05
        yield b'"x"}'

    response = await client.post(PATH, content=content(), headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "policy_unavailable")
    assert handler.seen == []


@pytest.mark.parametrize(
    ("ending", "refusal"), [(KEY_REVOKED, KeyRevoked), (KEY_EXPIRED, KeyExpired), (PROJECT_ARCHIVED, KeyWrong)]
)
def test_a_key_that_is_good_no_more_has_one_code_before_and_while_a_request_runs(
    ending: str, refusal: type[Unauthenticated]
) -> None:
    before, ended = refusal("no"), ended_early(GatedCall("t", (), 0.0, failed=ending))
    assert ended is not None
    assert (ended.status, ended.code, ended.headers) == (before.status, before.code, before.headers)


@pytest.mark.asyncio
async def test_a_project_that_is_archived_between_key_and_decision_is_no_other_than_one_that_was(
    client: httpx.AsyncClient, services: Any, snapshot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    archived = {name: replace(tenant, archived=True) for name, tenant in snapshot.tenants.items()}

    async def newer(_version: int) -> Any:
        return replace(snapshot, policy_version=8, tenants=MappingProxyType(archived))

    monkeypatch.setattr(services.policy, "at_least", newer)
    response = await client.post(PATH, json={"prompt": "x", "flexgate": {"min_policy_version": 8}})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["message"]) == (401, "invalid_api_key", WRONG_KEY)
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.asyncio
async def test_a_constraint_refused_in_a_stream_is_refused_as_before_one(
    client: httpx.AsyncClient, handler: Any
) -> None:
    refused = VLLMValidationError("The answer cannot be constrained as asked: it is too large.")
    body = {"prompt": "x", "structured_outputs": {"regex": "a"}}
    handler.result = refused
    before = (await client.post(PATH, json=body)).json()

    async def events() -> AsyncIterator[str]:
        yield f"data: {json.dumps(create_error_response(refused).model_dump())}\n\n"
        yield "data: [DONE]\n\n"

    handler.result = events
    response = await client.post(PATH, json={**body, "stream": True})
    assert json.loads(response.text.split("\n\n")[0].removeprefix("data: ")) == before
    assert before["error"]["code"] == "invalid_value"
    assert before["error"]["param"] == "structured_outputs"
