"""Prompts on their way through the queue into the engine and out of it: seats are given back once, whatever happens."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from scripted_engine import Engine
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.exceptions import EngineGenerateError

from flexgate.server.engine.frontend.calls import CURRENT_CALL, ExpertInfo, ExpertSlotRef, GatedCall
from flexgate.server.engine.frontend.client import GatedEngineClient
from flexgate.server.engine.protocol.gates import new_seal_key
from flexgate.server.engine.protocol.slots import SlotMap
from flexgate.server.inference.fair_queue import FairQueue

pytestmark = pytest.mark.asyncio

PUBLIC = ExpertSlotRef("public", 0, 1)
SEATS = 2


class World:
    """A client before a scripted engine that has a batch of two."""

    def __init__(self) -> None:
        self.engine, self.now = Engine(), 100.0
        self.queue = FairQueue(SEATS, share=1.0, most_queued=10, seconds=300)
        infos = (ExpertInfo("public", "o", "", 0, 1, True),)
        self.client = GatedEngineClient(
            self.engine,
            key=new_seal_key(),
            experts=infos,
            slot_map=SlotMap(1, (b"\0",)),
            answers=lambda: True,
            clock=lambda: self.now,
        )
        self.reading: list[asyncio.Task[None]] = []

    def call(self, project: str = "t", *, valid_until: float = math.inf, confirmed: bool = True) -> GatedCall:
        """A call that has begun."""
        made = GatedCall(
            project,
            (PUBLIC,),
            valid_until,
            queue=lambda choices, tokens: self.queue.enter(project, choices, tokens),
            confirmed=lambda: confirmed,
        )
        self.client.begin(made)
        return made

    def generate(self, call: GatedCall, n: int = 1) -> AsyncIterator[Any]:
        """What a handler gets."""
        token = CURRENT_CALL.set(call)
        params = SamplingParams(n=n, max_tokens=9, output_kind=RequestOutputKind.DELTA, detokenize=False)
        try:
            return self.client.generate({"prompt_token_ids": [1, 2, 3]}, params, "request")
        finally:
            CURRENT_CALL.reset(token)

    async def read(self, call: GatedCall, n: int = 1) -> asyncio.Task[None]:
        """Read an answer in the background."""

        async def all_of_it() -> None:
            async for _ in self.generate(call, n):
                pass

        task = asyncio.ensure_future(all_of_it())
        self.reading.append(task)
        await settled()
        return task

    def finish(self, child: int) -> None:
        """The engine generates the last token of one request."""
        output = EngineCoreOutput(self.engine.children[child], [7], finish_reason=FinishReason.LENGTH)
        self.engine.output_processor.process_outputs([output])


async def settled() -> None:
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    yield made
    for task in made.reading:
        task.cancel()
    await asyncio.gather(*made.reading, return_exceptions=True)
    assert (made.queue.free, made.queue.queued) == (SEATS, 0)
    assert made.client._running == {}


async def full(world: World) -> GatedCall:
    """Take every seat."""
    call = world.call("other")
    await world.read(call, SEATS)
    assert world.queue.free == 0
    return call


async def test_a_prompt_is_not_handed_over_before_its_turn(world: World) -> None:
    await full(world)
    reading = await world.read(world.call())
    assert len(world.engine.children) == SEATS
    world.finish(0)
    await settled()
    assert len(world.engine.children) == SEATS + 1
    world.finish(2)
    await asyncio.wait_for(reading, 10)


async def test_each_choice_gives_its_seat_back_when_it_is_generated(world: World) -> None:
    await full(world)
    world.finish(1)
    assert world.queue.free == 1
    world.finish(0)
    assert world.queue.free == 2


async def test_who_reads_slowly_keeps_no_seat(world: World) -> None:
    outputs = world.generate(world.call(), SEATS)
    asking = asyncio.ensure_future(anext(outputs))
    await settled()
    assert world.queue.free == 0
    world.finish(0)
    world.finish(1)
    assert world.queue.free == SEATS
    await asking
    await outputs.aclose()  # type: ignore[attr-defined]


async def test_who_leaves_while_it_runs_gives_the_seats_back(world: World) -> None:
    await full(world)
    world.reading[0].cancel()
    await asyncio.wait(world.reading)
    assert world.queue.free == SEATS


async def test_who_leaves_while_it_waits_is_waited_for_no_longer(world: World) -> None:
    await full(world)
    reading = await world.read(world.call())
    reading.cancel()
    await asyncio.wait({reading})
    assert world.queue.queued == 0
    world.finish(0)
    assert (len(world.engine.children), world.queue.free) == (SEATS, 1)


async def test_a_prompt_that_its_handler_never_reads_ends_with_its_call(world: World) -> None:
    call = world.call()
    world.generate(call)
    world.generate(call, SEATS)
    assert (world.queue.free, world.queue.queued) == (1, 1)
    world.client.end(call)
    assert (world.queue.free, world.queue.queued) == (SEATS, 0)


async def test_a_prompt_that_does_not_reach_the_engine_gives_its_seat_back(world: World) -> None:
    world.engine.unreachable = True
    reading = await world.read(world.call())
    with pytest.raises(OverflowError):
        await reading
    assert world.queue.free == SEATS


async def test_a_right_that_is_taken_ends_the_wait_at_once(world: World) -> None:
    await full(world)
    call = world.call()
    reading = await world.read(call)
    await asyncio.to_thread(world.client.stop, call, "key_revoked")
    with pytest.raises(EngineGenerateError, match="key_revoked"):
        await asyncio.wait_for(reading, 10)
    assert len(world.engine.children) == SEATS


async def test_a_revoked_expert_ends_the_wait_at_once(world: World) -> None:
    await full(world)
    call = world.call()
    reading = await world.read(call)
    assert call in world.client.revoke(PUBLIC)
    with pytest.raises(EngineGenerateError, match="expert_revoked"):
        await asyncio.wait_for(reading, 10)
    assert len(world.engine.children) == SEATS


async def test_a_right_that_ends_meanwhile_ends_the_wait_when_it_ends(world: World) -> None:
    await full(world)
    call = world.call()
    call.end_at(100.01, "key_expired")
    reading = await world.read(call)
    world.now = 100.02
    with pytest.raises(EngineGenerateError, match="key_expired"):
        await asyncio.wait_for(reading, 10)


async def test_a_gate_that_expires_meanwhile_is_not_sealed(world: World) -> None:
    await full(world)
    call = world.call(valid_until=100.01)
    reading = await world.read(call)
    world.now = 100.02
    with pytest.raises(EngineGenerateError, match="gate_expired"):
        await asyncio.wait_for(reading, 10)
    assert (call.failed, len(world.engine.children)) == ("gate_expired", SEATS)


async def test_who_waited_is_refused_where_the_policy_cannot_be_confirmed(world: World) -> None:
    await full(world)
    reading = await world.read(world.call(confirmed=False))
    world.finish(0)
    with pytest.raises(EngineGenerateError, match="policy_unavailable"):
        await asyncio.wait_for(reading, 10)
    assert len(world.engine.children) == SEATS


async def test_who_waits_too_long_is_told_so(world: World) -> None:
    world.queue.seconds = 0.01
    await full(world)
    call = world.call()
    reading = await world.read(call)
    with pytest.raises(EngineGenerateError, match="queued_too_long"):
        await asyncio.wait_for(reading, 10)
    assert call.failed == "queued_too_long"


async def test_a_call_without_a_queue_waits_for_nobody(world: World) -> None:
    """As the canary of an expert that is being added."""
    await full(world)
    canary = GatedCall("canary", (PUBLIC,), math.inf, priority=-1)
    reading = await world.read(canary)
    assert len(world.engine.children) == SEATS + 1
    world.finish(2)
    await asyncio.wait_for(reading, 10)
