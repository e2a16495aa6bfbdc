"""Events of a stream are made where the size of the engine's outputs belongs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import anyio
import httpx
import pytest
import torch
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsTensors

from flexgate.server.engine.seam import frontend
from flexgate.server.engine.seam.frontend import PromptLogprobs
from flexgate.server.http.offload import ON_LOOP_BYTES, Offload, on_loop
from flexgate.server.inference.openai import adapted
from flexgate.server.inference.openai.streaming import END, Outputs, Sizes, in_pieces


def output(tokens: int, *, prompt: int = 0, index: int = 0) -> Any:
    """An output of the engine."""
    part = SimpleNamespace(index=index, token_ids=[7] * tokens)
    return SimpleNamespace(outputs=[part], prompt_logprobs=[None] * prompt or None)


async def engine(*outputs: Any) -> AsyncGenerator[Any, None]:
    """Gives them, and raises what is an exception."""
    for one in outputs:
        await asyncio.sleep(0)
        if isinstance(one, Exception):
            raise one
        yield one


async def handler(outputs: Outputs, threads: list[int]) -> AsyncGenerator[str, None]:
    """Two events of each output and one at the end; notes the thread that makes each."""
    async for one in outputs:
        for _ in range(2):
            threads.append(threading.get_ident())
            yield f"{len(one.outputs[0].token_ids)}"
    threads.append(threading.get_ident())
    yield "end"


def stream(outputs: Outputs, events: Any, offload: Offload | None = None) -> Any:
    """The events, of which each token has a byte."""
    return in_pieces(events, offload or Offload(), "t", lambda tokens: tokens)


@pytest.mark.asyncio
async def test_long_events_are_made_off_the_loop_and_short_ones_on_it() -> None:
    outputs, threads = Outputs(engine(output(1), output(ON_LOOP_BYTES + 1), output(2))), list[int]()
    assert [event async for event in stream(outputs, handler(outputs, threads))] == [
        "1", "1", *[str(ON_LOOP_BYTES + 1)] * 2, "2", "2", "end",
    ]  # fmt: skip
    here = threading.get_ident()
    assert [thread == here for thread in threads] == [True, True, False, False, True, True, False]


@pytest.mark.asyncio
async def test_of_a_short_stream_all_is_made_on_the_loop() -> None:
    outputs, threads = Outputs(engine(output(1), output(2))), list[int]()
    assert len([event async for event in stream(outputs, handler(outputs, threads))]) == 5
    assert set(threads) == {threading.get_ident()}


def test_a_prompt_counts_once_for_each_choice_that_echoes_it_and_the_end_counts_everything() -> None:
    sizes = Sizes()
    assert sizes.tokens(output(1, prompt=1000)) == 1001
    assert sizes.tokens(output(1, prompt=1000, index=1)) == 1001
    assert sizes.tokens(output(1, prompt=1000)) == 1
    assert sizes.tokens((1, output(1, prompt=10))) == 11, "another prompt"
    assert sizes.tokens(SimpleNamespace(last_output=output(5))) == 5, "Responses"
    assert sizes.tokens(ValueError()) == 0
    assert sizes.tokens(END) == 2019


@pytest.mark.asyncio
async def test_what_the_engine_raises_reaches_the_handler() -> None:
    outputs = Outputs(engine(output(1), ValueError("overflow")))

    async def telling() -> AsyncGenerator[str, None]:
        try:
            async for _ in outputs:
                yield "token"
        except ValueError as error:
            yield str(error)

    assert [event async for event in stream(outputs, telling())] == ["token", "overflow"]


@pytest.mark.asyncio
async def test_on_the_loop_a_handler_may_wait_for_anything_and_off_it_that_is_an_error() -> None:
    outputs = Outputs(engine(output(1), output(ON_LOOP_BYTES + 1)))

    async def waiting() -> AsyncGenerator[str, None]:
        async for _ in outputs:
            await asyncio.sleep(0)
            yield "token"

    events = stream(outputs, waiting())
    assert await anext(events) == "token"
    with pytest.raises(TypeError, match="waits for None"):
        await anext(events)


async def cancelled_once(reading: Awaitable[None]) -> AsyncGenerator[Callable[[], None], None]:
    task = asyncio.ensure_future(reading)
    yield task.cancel
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancelled_as_starlette_does(reading: Awaitable[None]) -> AsyncGenerator[Callable[[], None], None]:
    """A scope cancels what waits in it anew in every turn of the loop."""
    scope = anyio.CancelScope()

    async def read() -> None:
        with scope:
            await reading

    task = asyncio.ensure_future(read())
    yield scope.cancel
    await task
    assert scope.cancelled_caught


@pytest.mark.asyncio
@pytest.mark.parametrize("cancelling", [cancelled_once, cancelled_as_starlette_does])
@pytest.mark.parametrize("then", ["gives an event", "reads on"])
async def test_a_client_that_leaves_waits_for_what_is_being_made_and_ends_the_handler(
    then: str, cancelling: Any
) -> None:
    going, go, ended = threading.Event(), threading.Event(), list[str]()
    outputs = Outputs(engine(output(ON_LOOP_BYTES + 1)))

    async def slow() -> AsyncGenerator[str, None]:
        try:
            async for _ in outputs:
                going.set()
                assert go.wait(20)
                ended.append("made")
                if then == "gives an event":
                    yield "token"
        finally:
            ended.append("closed")

    async def read() -> None:
        async for _ in stream(outputs, slow()):
            raise AssertionError

    async with asynccontextmanager(cancelling)(read()) as cancel:
        assert await asyncio.to_thread(going.wait, 20)
        cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert ended == []
        go.set()
    assert ended == ["made", "closed"]


@pytest.mark.asyncio
async def test_a_client_that_leaves_between_two_outputs_ends_the_handler_and_the_engines_request() -> None:
    ended, waits = list[str](), asyncio.Event()

    async def endless() -> AsyncGenerator[Any, None]:
        try:
            waits.set()
            await asyncio.Event().wait()
            yield
        finally:
            ended.append("engine")

    outputs = Outputs(endless())

    async def plain() -> AsyncGenerator[str, None]:
        try:
            async for _ in outputs:
                yield "token"
        finally:
            ended.append("handler")

    reading = asyncio.create_task(anext(stream(outputs, plain())))
    await waits.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert ended == ["engine", "handler"]


@pytest.mark.asyncio
async def test_what_belongs_to_the_loop_is_done_there_from_anywhere() -> None:
    offload, here = Offload(), threading.get_ident()
    assert on_loop(threading.get_ident) == here
    assert await offload.run_for("t", lambda: on_loop(threading.get_ident)) == here
    assert await offload.run_for("t", threading.get_ident) != here
    with pytest.raises(ZeroDivisionError):
        await offload.run_for("t", lambda: on_loop(lambda: 1 / 0))


@pytest.mark.asyncio
async def test_a_long_last_event_of_a_stream_is_written_off_the_loop_and_its_usage_committed_on_it(
    client: httpx.AsyncClient, handler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexgate.server.inference.limits.limiter import Reservation

    chunk = 'data: {"choices":[{"index":0,"text":"x","finish_reason":"length"}]}\n\n'
    outputs, threads = Outputs(engine(output(10_000))), dict[str, set[int]](made=set(), committed=set())

    async def events() -> AsyncGenerator[str, None]:
        async for _ in outputs:
            threads["made"].add(threading.get_ident())
            yield chunk

    commit = Reservation.commit

    def committed(*args: Any, **options: Any) -> None:
        threads["committed"].add(threading.get_ident())
        commit(*args, **options)

    monkeypatch.setattr(Reservation, "commit", committed)
    handler.result = events
    answer = await client.post("/v1/completions", json={"prompt": "a", "stream": True})
    assert '"flexgate":' in answer.text
    assert threads["committed"] == {threading.get_ident()}
    assert not threads["made"] & threads["committed"]


@pytest.mark.parametrize(
    ("served", "name", "before"),
    [
        (adapted.LaterChat, "chat_completion_stream_generator", ("request",)),
        (adapted.LaterCompletion, "completion_stream_generator", ("request", "prompts")),
        (adapted.LaterResponses, "responses_stream_generator", ("request", "params")),
    ],
)
def test_every_streaming_handler_reads_outputs_that_can_be_brought(
    monkeypatch: pytest.MonkeyPatch, served: Any, name: str, before: tuple[str, ...]
) -> None:
    monkeypatch.setattr(served.__bases__[0], name, lambda _self, *args: args)
    *given, outputs, last = getattr(served.__new__(served), name)(*before, "source", "last")
    assert (tuple(given), outputs.source, last) == (before, "source", "last")
    assert isinstance(outputs, Outputs)


def _scores(positions: int) -> LogprobsTensors:
    ids = torch.arange(2 * positions, dtype=torch.int32).reshape(positions, 2)
    return LogprobsTensors(ids, -ids.float(), torch.ones(positions, dtype=torch.int32))


def _processor() -> LogprobsProcessor:
    beginning: Any = [None]
    return LogprobsProcessor(None, None, beginning, None, None, 1)


def test_log_probabilities_of_a_prompt_are_made_when_they_are_read_and_are_vllms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = _processor()
    for positions in (3, 2):
        frontend._make(usual, _scores(positions))

    made, plain = list[int](), frontend._make
    monkeypatch.setattr(frontend, "_make", lambda *args: (made.append(1), plain(*args)))
    frontend.make_prompt_logprobs_later()
    later = _processor()
    for positions in (3, 2):
        later._update_prompt_logprobs(_scores(positions))
    scores = later.pop_prompt_logprobs()
    assert isinstance(scores, PromptLogprobs)
    assert (len(scores), later.pop_prompt_logprobs(), made) == (6, [], [])
    assert list(scores) == usual.prompt_logprobs == scores.made()
    assert (scores[1:], made) == (usual.prompt_logprobs[1:], [1, 1])


@pytest.mark.asyncio
async def test_a_plain_answer_has_vllms_own_list_of_them() -> None:
    scores = PromptLogprobs(_processor())
    scores.add(_scores(2))
    given = SimpleNamespace(prompt_logprobs=scores)
    assert [type(one.prompt_logprobs) async for one in adapted._again([given])] == [list]
