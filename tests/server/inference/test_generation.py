"""What is generated for a request, whole and streamed, with handlers that stand for vLLM's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from inferencekit import BODIES, PATH, completion
from vllm.entrypoints.openai.completion.protocol import CompletionResponse
from vllm.entrypoints.openai.responses.protocol import ResponseCompletedEvent, ResponsesRequest, ResponsesResponse
from vllm.exceptions import QueueOverflowError

from flexgate.server.engine.frontend.calls import CURRENT_CALL, ExpertUse, GatedCall
from flexgate.server.inference.fair_queue import FairQueue


@pytest.mark.asyncio
async def test_an_answer_has_the_object_the_headers_and_no_peer_fields(client: httpx.AsyncClient, handler: Any) -> None:
    handler.result = completion
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
    from flexgate.server.engine.frontend.calls import Attribution

    forbidden = Attribution((ExpertUse("math", 1, 0.5, 1),), 0)
    monkeypatch.setattr(GatedCall, "attribution", lambda self: forbidden)
    handler.result = completion
    response = await client.post(PATH, json={"prompt": "x"})
    assert response.status_code == 500
    assert "choices" not in response.text


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
        for name, count in (("a", 3), ("b", 4)):
            handler.calls[-1].count_usage(name, name, [9, count, [], []])
        return completion()

    handler.result = cached
    usage = (await client.post(PATH, json={"prompt": ["x", "y"]})).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 7}


@pytest.mark.asyncio
async def test_an_engine_without_room_is_no_fault_of_a_constraint(client: httpx.AsyncClient, handler: Any) -> None:
    handler.result = QueueOverflowError()
    body = {"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}}
    error = (await client.post(PATH, json=body)).json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "engine_overloaded")
