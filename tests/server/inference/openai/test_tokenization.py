"""`/tokenize` and `/detokenize`, with a handler that stands for vLLM's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import httpx
import pytest
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeResponse, TokenizeResponse

from flexgate.policies.documents import Quota
from flexgate.server.inference.openai.tokenization import AT_ONCE
from flexgate.server.inference.request.limits import Limits
from flexgate.server.lifecycle.app import build_app

pytestmark = pytest.mark.asyncio

BODIES: dict[str, dict[str, Any]] = {"/tokenize": {"prompt": "x"}, "/detokenize": {"tokens": [1]}}
HELLO = {"role": "user", "content": "hello"}
LONG_PARTS = [{"type": "text", "text": "x" * 80}]
TOOL = {"type": "function", "function": {"name": "f", "description": "d" * 90, "parameters": {"type": "object"}}}


def tokens() -> TokenizeResponse:
    return TokenizeResponse(count=1, max_model_len=8, tokens=[1])


class Busy:
    """A tokenizer whose thread is busy until a test says otherwise."""

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.begun = 0
        self.ended = 0

    async def __call__(self, *_: Any) -> TokenizeResponse:
        self.begun += 1
        try:
            await self.free.wait()
        finally:
            self.ended += 1
        return tokens()


@pytest.fixture
def limit(store: Any, services: Any) -> Callable[..., None]:
    """Set the limits of project t."""

    def set_(**quota: int) -> None:
        snapshot = store.answer
        tenant = replace(snapshot.tenants["t"], quota=Quota(**quota))
        store.answer = replace(snapshot, tenants=MappingProxyType({**snapshot.tenants, "t": tenant}))
        services.policy.confirm()
        services.policy._served = None
        services.budget_usage.refresh()

    return set_


@pytest.fixture
def busy(services: Any) -> Busy:
    made = Busy()
    services.handlers.tokenization.create_tokenize = made
    return made


@pytest.mark.parametrize("path", BODIES)
async def test_requests_count_and_are_refused_like_generating_ones(
    client: httpx.AsyncClient, handler: Any, limit: Any, path: str
) -> None:
    limit(requests_per_minute=1, tokens_per_minute=100, concurrent_requests=1, total_tokens=0)
    handler.result = tokens if path == "/tokenize" else lambda: DetokenizeResponse(prompt="x")
    first = await client.post(path, json=BODIES[path])
    assert first.status_code == 200
    assert first.headers["x-ratelimit-remaining-requests"] == "0"
    assert first.headers["x-ratelimit-remaining-tokens"] == "100"
    second = await client.post(path, json=BODIES[path])
    assert second.status_code == 429
    assert second.json()["error"]["code"] == "rate_limit_exceeded"
    assert second.headers["x-ratelimit-remaining-requests"] == "0"
    assert len(handler.seen) == 1


@pytest.mark.parametrize("result", [tokens, ValueError("bad"), RuntimeError("inside")])
async def test_an_end_gives_back_what_was_held(
    client: httpx.AsyncClient, handler: Any, limit: Any, result: Any
) -> None:
    limit(concurrent_requests=1)
    for _ in range(AT_ONCE + 1):
        handler.result = result
        await client.post("/tokenize", json={"prompt": "x"})
    handler.result = tokens
    assert (await client.post("/tokenize", json={"prompt": "x"})).status_code == 200


async def test_a_project_has_few_places_at_the_tokenizer_and_takes_nobody_elses(
    make_client: Callable[..., httpx.AsyncClient], busy: Busy
) -> None:
    async with make_client() as mine, make_client("sk-u") as other:
        waiting = [asyncio.ensure_future(mine.post("/tokenize", json={"prompt": "x"})) for _ in range(AT_ONCE)]
        while busy.begun < AT_ONCE:
            await asyncio.sleep(0)
        refused = await asyncio.wait_for(mine.post("/tokenize", json={"prompt": "x"}), 5)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["message"] == (
            "This project has reached its limit of 4 tokenizer requests at once. Try again in 1s."
        )
        theirs = asyncio.ensure_future(other.post("/tokenize", json={"prompt": "x"}))
        while busy.begun < AT_ONCE + 1:
            await asyncio.sleep(0)
        busy.free.set()
        assert {(await one).status_code for one in (*waiting, theirs)} == {200}
        assert (await mine.post("/tokenize", json={"prompt": "x"})).status_code == 200


async def test_nothing_is_done_for_a_client_that_has_gone(services: Any, busy: Busy) -> None:
    app = build_app(services)
    scope = {"type": "http", "method": "POST", "path": "/tokenize", "query_string": b"", "http_version": "1.1"}
    scope |= {"headers": [(b"authorization", b"Bearer sk-t"), (b"content-type", b"application/json")]}
    asked = iter([{"type": "http.request", "body": b'{"prompt": "x"}', "more_body": False}])
    sent: list[Any] = []

    async def receive() -> Any:
        for message in asked:
            return message
        while not busy.begun:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await asyncio.wait_for(app(scope, receive, send), 5)
    assert (busy.begun, busy.ended) == (1, 1)
    assert sent[0]["status"] == 499


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"prompt": "x" * 81}, "prompt"),
        ("/tokenize", {"messages": [HELLO] * 10}, "messages"),
        ("/tokenize", {"messages": [HELLO], "tools": [TOOL]}, "messages"),
        ("/detokenize", {"tokens": [1] * 9}, "tokens"),
        ("/v1/completions", {"prompt": ["x", "x" * 81], "truncate_prompt_tokens": 4}, "prompt"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": LONG_PARTS}], "truncate_prompt_tokens": 4},
            "messages",
        ),
        ("/v1/completions", {"prompt": [7] * 81}, "prompt"),
        ("/v1/responses", {"input": "x", "instructions": "x" * 80, "truncation": "auto"}, "input"),
    ],
)
async def test_what_cannot_fit_the_model_does_not_reach_the_tokenizer(
    client: httpx.AsyncClient, services: Any, handler: Any, path: str, body: dict[str, Any], param: str
) -> None:
    services.limits = Limits(prompt_tokens=8, prompt_chars=80)
    refused = await client.post(path, json=body)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["code"] == ("limit_exceeded" if path == "/detokenize" else "context_length_exceeded")
    assert error["param"] == param
    begin = "" if path == "/detokenize" else "The prompt is too long: "
    assert error["message"].startswith(f"{begin}'{error['param']}' may have at most ")
    assert not handler.seen


async def test_what_may_just_fit_goes_on(client: httpx.AsyncClient, services: Any, handler: Any) -> None:
    services.limits = Limits(prompt_tokens=8, prompt_chars=80)
    handler.result = tokens
    for path, body in (("/tokenize", {"prompt": "x" * 80}), ("/detokenize", {"tokens": [1] * 8})):
        assert (await client.post(path, json=body)).status_code == 200
