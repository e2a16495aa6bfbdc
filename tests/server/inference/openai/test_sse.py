"""Where the `flexgate` object goes in a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgate.server.inference.openai import sse
from flexgate.server.inference.openai.sse import COMMENT, DONE, Begun, encode, encode_named, with_report

REPORT = {"decision_id": "d"}


def chunk(index: int = 0, finish: str | None = None, text: str = "x", **more: Any) -> str:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": finish}
    return encode({"id": "c", "choices": [choice], **more})


USAGE = encode({"id": "c", "choices": [], "usage": {"total_tokens": 3}})


async def added(
    events: list[str], *, choices: int = 1, include_usage: bool = False
) -> list[tuple[int, dict[str, Any]]]:
    """Positions and payloads of the events that carry the object; the others are unchanged."""

    async def source() -> AsyncIterator[str]:
        for event in events:
            yield event

    stream = with_report(
        source(),
        choices=choices,
        include_usage=include_usage,
        report=lambda payload: {**payload, "flexgate": REPORT},
        reshape_error=lambda payload: {"error": {"reshaped": payload["error"]["code"]}},
    )
    out = [event async for event in stream]
    assert len(out) == len(events), "an event was added or lost"
    found = []
    for position, (before, after) in enumerate(zip(events, out, strict=True)):
        if before == after:
            continue
        payload = json.loads(after.removeprefix("data: "))
        found.append((position, payload))
        if "flexgate" in payload:
            rest = {name: value for name, value in payload.items() if name != "flexgate"}
            assert rest == json.loads(before.removeprefix("data: "))
    return found


@pytest.mark.asyncio
async def test_it_is_on_the_finish_chunk() -> None:
    ((position, payload),) = await added([chunk(), chunk(finish="stop"), DONE])
    assert (position, payload["flexgate"]) == (1, REPORT)


@pytest.mark.asyncio
async def test_with_include_usage_it_is_on_the_usage_chunk_only() -> None:
    ((position, _),) = await added([chunk(), chunk(finish="stop"), USAGE, DONE], include_usage=True)
    assert position == 2


@pytest.mark.asyncio
async def test_with_several_choices_it_is_on_the_last_to_finish() -> None:
    events = [chunk(1, "stop"), chunk(0), chunk(2, "length"), chunk(0, "stop"), DONE]
    ((position, _),) = await added(events, choices=3)
    assert position == 3


@pytest.mark.asyncio
async def test_a_choice_that_finishes_twice_counts_once() -> None:
    events = [chunk(0, "stop"), chunk(0, "stop"), chunk(1, "stop")]
    ((position, _),) = await added(events, choices=2)
    assert position == 2


@pytest.mark.asyncio
async def test_usage_on_every_chunk_is_not_the_usage_chunk() -> None:
    events = [chunk(usage={"total_tokens": 1}), chunk(finish="stop", usage={}), USAGE]
    ((position, _),) = await added(events, include_usage=True)
    assert position == 2


@pytest.mark.parametrize("text", ['"finish_reason":"stop"', '"choices":[]', '{"error"', "data: "])
@pytest.mark.asyncio
async def test_text_that_looks_like_a_mark_is_text(text: str) -> None:
    for include_usage in (False, True):
        events = [chunk(text=text), chunk(finish="stop", text=text), USAGE, DONE]
        ((position, _),) = await added(events, include_usage=include_usage)
        assert position == (2 if include_usage else 1)


@pytest.mark.asyncio
async def test_an_error_chunk_gets_this_servers_shape() -> None:
    ((position, payload),) = await added([chunk(), encode({"error": {"code": 500}}), DONE])
    assert (position, payload) == (1, {"error": {"reshaped": 500}})


@pytest.mark.asyncio
async def test_a_stream_that_broke_off_has_no_report() -> None:
    assert await added([chunk(), chunk(1, "stop"), DONE], choices=2) == []


@given(st.data())
@pytest.mark.asyncio
async def test_any_interleaving_carries_it_exactly_once(data: st.DataObject) -> None:
    choices = data.draw(st.integers(1, 4))
    finishes = data.draw(st.permutations(range(choices)))
    events: list[str] = []
    for index in finishes:
        noise = data.draw(st.lists(st.integers(0, choices - 1), max_size=3))
        events += [chunk(i, text=data.draw(st.sampled_from(["", "x", '"choices":[]']))) for i in noise]
        events.append(chunk(index, "stop"))
    ((position, payload),) = await added([*events, DONE], choices=choices)
    assert position == len(events) - 1
    assert payload["choices"][0]["index"] == finishes[-1]


def test_a_named_event_has_its_type_as_name() -> None:
    assert encode_named({"type": "error", "code": None}) == ('event: error\ndata: {"type":"error","code":null}\n\n')


@pytest.mark.asyncio
async def test_a_stream_that_waits_says_so_until_its_first_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "SILENT_SECONDS", 0.01)
    begin = asyncio.Event()

    async def events() -> AsyncIterator[str]:
        await begin.wait()
        yield chunk()
        yield DONE

    stream = Begun(events()).with_comments()
    assert [await anext(stream), await anext(stream)] == [COMMENT, COMMENT]
    begin.set()
    left = [event async for event in stream]
    assert [event for event in left if event != COMMENT] == [chunk(), DONE]


@pytest.mark.asyncio
async def test_a_stream_that_is_left_while_it_waits_is_closed() -> None:
    waiting, closed = asyncio.Event(), asyncio.Event()

    async def events() -> AsyncIterator[str]:
        try:
            waiting.set()
            await asyncio.Event().wait()
            yield chunk()
        finally:
            closed.set()

    async def read() -> None:
        async with aclosing(Begun(events())) as begun:
            async for _ in begun.with_comments():
                pass

    reading = asyncio.create_task(read())
    await waiting.wait()
    reading.cancel()
    await asyncio.wait({reading})
    assert closed.is_set()


@pytest.mark.asyncio
async def test_a_stream_without_events_ends() -> None:
    async def events() -> AsyncIterator[str]:
        return
        yield

    assert [event async for event in Begun(events()).with_comments()] == []
