"""Responses that are long, or repeat a large body, are made and written away from the event loop."""

from __future__ import annotations

import threading
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from flexgate.server.http.offload import ON_LOOP_BYTES


@pytest.mark.asyncio
@pytest.mark.parametrize(("tokens", "on_loop"), [(10, True), (10_000, False)])
async def test_a_long_answer_is_made_and_written_off_the_loop(
    client: httpx.AsyncClient, handler: Any, monkeypatch: pytest.MonkeyPatch, tokens: int, on_loop: bool
) -> None:
    from flexgate.server.engine.frontend.calls import GatedCall
    from flexgate.server.inference.limits.limiter import Reservation
    from flexgate.server.inference.openai.adapted import Later

    threads, counting = list[int](), set[int]()

    def headers(_: Reservation) -> dict[str, str]:
        counting.add(threading.get_ident())
        return {}

    def dump() -> dict[str, Any]:
        threads.append(threading.get_ident())
        return {}

    async def make() -> Any:
        threads.append(threading.get_ident())
        return SimpleNamespace(model_dump=dump)

    monkeypatch.setattr(GatedCall, "tokens", lambda _: tokens)
    monkeypatch.setattr(Reservation, "headers", property(headers))
    handler.result = Later(make)
    assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 200
    assert counting == {threading.get_ident()}, "the limiter's counters are the loop's alone"
    assert [thread == threading.get_ident() for thread in threads] == [on_loop] * 2


@pytest.mark.asyncio
@pytest.mark.parametrize(("tokens", "on_loop"), [(10, True), (10_000, False)])
async def test_what_a_long_answer_was_made_of_is_freed_off_the_loop(
    client: httpx.AsyncClient, handler: Any, monkeypatch: pytest.MonkeyPatch, tokens: int, on_loop: bool
) -> None:
    from flexgate.server.engine.frontend.calls import GatedCall
    from flexgate.server.inference.openai.adapted import Later

    freed = dict[str, int]()

    class Noted:
        model_dump = dict

        def __init__(self, what: str) -> None:
            weakref.finalize(self, lambda: freed.update({what: threading.get_ident()}))

    async def make(_: Any) -> Any:
        return Noted("response")

    monkeypatch.setattr(GatedCall, "tokens", lambda _: tokens)
    handler.result = lambda: Later(partial(make, Noted("outputs")))
    assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 200
    assert {what: thread == threading.get_ident() for what, thread in freed.items()} == {
        "outputs": on_loop,
        "response": on_loop,
    }


@pytest.mark.asyncio
async def test_an_answer_whose_right_ends_while_it_is_made_is_not_given(
    client: httpx.AsyncClient, handler: Any
) -> None:
    from flexgate.server.engine.frontend.calls import CURRENT_CALL
    from flexgate.server.engine.protocol.endings import KEY_REVOKED
    from flexgate.server.inference.openai.adapted import Later

    async def make() -> Any:
        handler.calls[-1].failed = KEY_REVOKED
        assert CURRENT_CALL.get() is None
        return SimpleNamespace(model_dump=dict)

    handler.result = Later(make)
    refused = await client.post("/v1/completions", json={"prompt": "a"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.asyncio
@pytest.mark.parametrize("stream", [True, False])
async def test_only_a_responses_answer_that_is_not_streamed_is_made_later(
    monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    from flexgate.server.inference.openai import adapted

    async def full(*_: Any) -> str:
        return "made"

    async def nothing() -> Any:
        for event in ():
            yield event

    monkeypatch.setattr(adapted.OpenAIServingResponses, "responses_full_generator", full)
    responses = adapted.LaterResponses.__new__(adapted.LaterResponses)
    answer: Any = await responses.responses_full_generator(SimpleNamespace(stream=stream), None, nothing())
    assert (answer if stream else await answer.take()) == "made"


@pytest.mark.asyncio
async def test_a_short_answer_that_repeats_a_large_body_is_written_off_the_loop(
    client: httpx.AsyncClient, handler: Any
) -> None:
    threads: list[int] = []

    def dump(**_: Any) -> dict[str, Any]:
        threads.append(threading.get_ident())
        return {}

    handler.result = SimpleNamespace(model_dump=dump)
    for path, long in (("/v1/responses", {"input": "a" * ON_LOOP_BYTES}), ("/v1/responses", {"input": "a"})):
        assert (await client.post(path, json=long)).status_code == 200
    assert [thread == threading.get_ident() for thread in threads] == [False, True]


@pytest.mark.asyncio
async def test_the_first_events_of_a_stream_may_repeat_a_large_body(client: httpx.AsyncClient, handler: Any) -> None:
    threads: list[int] = []

    async def events() -> Any:
        threads.append(threading.get_ident())
        yield 'data: {"choices":[{"index":0,"text":"x","finish_reason":"length"}]}\n\n'

    handler.result = events
    for text in ("a" * ON_LOOP_BYTES, "a"):
        assert (await client.post("/v1/completions", json={"prompt": text, "stream": True})).status_code == 200
    assert [thread == threading.get_ident() for thread in threads] == [False, True]
