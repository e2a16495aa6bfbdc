"""Limits on the path of a generating request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from vllm.entrypoints.openai.completion.protocol import CompletionResponse, CompletionResponseChoice
from vllm.entrypoints.serve.engine.protocol import UsageInfo

from flexgate.policies.documents import Quota
from flexgate.server.engine.frontend.calls import CURRENT_CALL
from flexgate.server.inference.limits.limiter import stated_tokens
from flexgate.server.lifecycle.app import build_app

pytestmark = pytest.mark.asyncio


def answer() -> CompletionResponse:
    call = CURRENT_CALL.get()
    assert call is not None
    call.count_prompt("r", 5)
    call.count_new(7)
    return CompletionResponse(model="tiny", choices=[CompletionResponseChoice(index=0, text="hi")], usage=UsageInfo())


async def post(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/v1/completions", json={"prompt": "x", **body})


async def test_an_answer_tells_the_limits_and_the_next_request_is_over_them(
    client: httpx.AsyncClient, handler: Any, limit: Any
) -> None:
    limit(requests_per_minute=1, tokens_per_minute=100)
    handler.result = answer
    first = await post(client, max_tokens=20)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-limit-requests"] == "1"
    assert first.headers["x-ratelimit-remaining-requests"] == "0"
    assert first.headers["x-ratelimit-remaining-tokens"] == "88"  # what it used, and no more what it might have used
    second = await post(client)
    assert second.status_code == 429
    assert second.json()["error"]["code"] == "rate_limit_exceeded"
    assert second.headers["x-ratelimit-remaining-tokens"] == "88"
    assert len(handler.seen) == 1


async def test_openais_client_raises_its_own_error(make_client: Any, handler: Any, limit: Any) -> None:
    limit(requests_per_minute=0)
    async with make_client() as http:
        client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="sk-t", http_client=http, max_retries=0)
        with pytest.raises(openai.RateLimitError) as caught:
            await client.completions.create(model="tiny", prompt="x")
    assert caught.value.code == "rate_limit_exceeded"
    assert not handler.seen


async def test_a_key_has_limits_of_its_own(client: httpx.AsyncClient, handler: Any, limit: Any) -> None:
    limit(Quota(requests_per_minute=1), requests_per_minute=10)
    handler.result = answer
    await post(client)
    refused = await post(client)
    assert refused.json()["error"]["message"].startswith("This key has reached its limit of 1 requests per minute.")


async def test_a_stream_runs_until_it_is_closed(client: httpx.AsyncClient, handler: Any, limit: Any) -> None:
    limit(concurrent_requests=1, total_tokens=1000)
    inside: list[int] = []

    async def events() -> AsyncIterator[str]:
        call = CURRENT_CALL.get()
        assert call is not None
        call.count_prompt("r", 5)
        for tokens in (3, 4):
            call.count_new(tokens)
        inside.append((await post(client)).status_code)
        yield 'data: {"choices":[{"index":0,"finish_reason":"stop"}]}\n\n'
        yield "data: [DONE]\n\n"

    handler.result = events
    assert (await post(client, stream=True)).status_code == 200
    assert inside == [429]
    handler.result = answer
    assert (await post(client)).status_code == 200


FAILURE = 'data: {"error":{"message":"broken","type":"InternalServerError","param":null,"code":500}}\n\n'
FINISHED = 'data: {"choices":[{"index":0,"finish_reason":"stop"}]}\n\n'


@pytest.mark.parametrize("events", [None, (FINISHED, "data: [DONE]\n\n"), (FAILURE, "data: [DONE]\n\n")])
async def test_who_has_read_the_end_may_ask_again_at_once(
    services: Any, handler: Any, limit: Any, events: tuple[str, ...] | None
) -> None:
    limit(concurrent_requests=1, tokens_per_minute=100)
    app = build_app(services)
    headers = {"authorization": "Bearer sk-t"}
    seen: list[httpx.Response] = []

    async def stream() -> AsyncIterator[str]:
        answer()
        for event in events or ():
            yield event

    async def asking_as_it_reads(scope: Any, receive: Any, send: Any) -> None:
        async def send_and_ask(message: Any) -> None:
            await send(message)
            if any(end in message.get("body", b"") for end in (b"finish_reason", b"[DONE]")):
                handler.result = answer
                async with httpx.AsyncClient(
                    transport=httpx.ASGITransport(app), base_url="http://test", headers=headers
                ) as other:
                    seen.append(await post(other, max_tokens=20))

        await app(scope, receive, send_and_ask)

    handler.result = stream if events else answer
    transport = httpx.ASGITransport(asking_as_it_reads)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as http:
        await post(http, stream=events is not None, max_tokens=90)
    assert [response.status_code for response in seen] == [200] * len(seen) != []
    assert seen[0].headers["x-ratelimit-remaining-tokens"] == "76"


async def test_who_leaves_in_mid_stream_releases_its_reservation(
    services: Any, client: httpx.AsyncClient, handler: Any, limit: Any
) -> None:
    limit(concurrent_requests=1)
    app = build_app(services)

    async def endless() -> AsyncIterator[str]:
        while True:
            yield 'data: {"choices":[{"index":0,"text":"x","finish_reason":null}]}\n\n'

    async def leaving(scope: Any, receive: Any, send: Any) -> None:
        async def send_once(message: Any) -> None:
            if message["type"] == "http.response.body":
                raise OSError("the client is gone")
            await send(message)

        await app(scope, receive, send_once)

    handler.result = endless
    transport = httpx.ASGITransport(leaving, raise_app_exceptions=False)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://test", headers={"authorization": "Bearer sk-t"}
    ) as http:
        await post(http, stream=True)
    handler.result = answer
    assert (await post(client)).status_code == 200


@pytest.mark.parametrize("result", [ValueError("bad"), RuntimeError("inside"), None])
async def test_a_request_that_fails_releases_its_reservation(
    client: httpx.AsyncClient, handler: Any, limit: Any, result: Any
) -> None:
    limit(concurrent_requests=1, tokens_per_minute=100)
    for _ in range(3):
        handler.result = result
        await post(client, max_tokens=90)
    handler.result = answer
    assert (await post(client, max_tokens=90)).status_code == 200


async def test_a_budget_that_is_spent_stays_spent(
    client: httpx.AsyncClient, handler: Any, limit: Any, services: Any
) -> None:
    limit(total_tokens=20)
    handler.result = answer
    assert (await post(client)).status_code == 200
    services.budget_usage.refresh()
    assert (await post(client)).status_code == 200
    refused = await post(client)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota")


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({}, 0),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 7, "n": 2}, 14),
        ({"max_output_tokens": 9}, 9),
        ({"max_tokens": 5, "prompt": ["a", "b", "c"]}, 15),
        ({"max_tokens": 5, "prompt": [[1, 2, 3]]}, 5),
        ({"max_tokens": 5, "prompt": [[1, 2], [3]]}, 10),
    ],
)
async def test_what_a_request_asks_for_at_most(body: dict[str, Any], tokens: int) -> None:
    assert stated_tokens(body) == tokens
