import asyncio
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from clocks import Clock
from scripted_engine import Engine
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.exceptions import EngineGenerateError

from flexgate.kernels.gated_topk import MASS_SCALE
from flexgate.server.engine.frontend import client as client_module
from flexgate.server.engine.frontend.calls import CURRENT_CALL, ExpertInfo, ExpertSlotRef, GatedCall
from flexgate.server.engine.frontend.client import GatedEngineClient
from flexgate.server.engine.frontend.constraining import Constrainer
from flexgate.server.engine.protocol.endings import CONSTRAINT_SLOW, CONSTRAINT_UNAVAILABLE
from flexgate.server.engine.protocol.gates import GateError, new_seal_key, open_seal
from flexgate.server.engine.protocol.slots import SlotMap

KEY = new_seal_key()
INFO = ExpertInfo("public", "o", "", 0, 1, True)
ONE = SlotMap(1, (b"\0",))


def test_nothing_goes_out_without_a_call() -> None:
    client = object.__new__(GatedEngineClient)
    with pytest.raises(GateError, match="outside of a gated call"):
        client.generate({"prompt_token_ids": [1]}, None, "request")  # type: ignore[arg-type]


@pytest.fixture
def engine(clock: Clock) -> Engine:
    made = Engine()
    made.clock = clock
    return made


@pytest.fixture
def call(engine: Engine) -> Iterator[GatedCall]:
    """A call that is current."""
    made = GatedCall("t", (ExpertSlotRef("public", 0, 1),), math.inf)
    token = CURRENT_CALL.set(made)
    yield made
    CURRENT_CALL.reset(token)


async def begin(
    engine: Engine, call: GatedCall, kind: RequestOutputKind, n: int, slot_map: SlotMap = ONE, **more: Any
) -> "asyncio.Task[None]":
    client = GatedEngineClient(
        engine, key=KEY, experts=(INFO,), slot_map=slot_map, answers=lambda: True, clock=engine.clock
    )
    engine.client = client
    client.begin(call)
    CURRENT_CALL.set(call)
    params = SamplingParams(n=n, max_tokens=9, output_kind=kind, detokenize=False, **more)

    async def read() -> None:
        async for _ in client.generate({"prompt_token_ids": [1, 2, 3]}, params, "request"):
            pass

    task = asyncio.ensure_future(read())
    while len(engine.children) < n:
        assert not task.done()
        await asyncio.sleep(0)
    return task


@pytest.mark.asyncio
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", list(RequestOutputKind), ids=lambda kind: kind.name)
async def test_what_is_generated_counts_whether_or_not_anybody_reads_it(
    engine: Engine, call: GatedCall, kind: RequestOutputKind, n: int
) -> None:
    """The prompt from the moment the engine has it, once for all choices; each token as it comes."""
    reading = await begin(engine, call, kind, n)
    assert call.tokens() == 3
    engine.step(7)
    engine.step(8)
    assert call.tokens() == 3 + 2 * n
    engine.step(9, finish=True)
    assert call.tokens() == 3 + 3 * n
    await reading


@pytest.mark.asyncio
async def test_routing_weight_is_averaged_over_layers_that_have_experts(engine: Engine, call: GatedCall) -> None:
    map_ = SlotMap(1, (b"", b"\0", b"\0"))
    reading = await begin(engine, call, RequestOutputKind.DELTA, 1, slot_map=map_)
    call.count_usage("request", "request", [3, 0, [6 * MASS_SCALE, 3], [0, 0]])
    assert [use.gate_mass for use in call.attribution().experts] == [3.0]
    engine.step(9, finish=True)
    await reading


def test_all_that_a_call_can_use_is_reserved_before_the_engine_has_a_prompt(engine: Engine, call: GatedCall) -> None:
    client = GatedEngineClient(engine, key=KEY, experts=(), slot_map=ONE, answers=lambda: True, clock=engine.clock)
    reserved: list[tuple[int, int]] = []

    def reserve(*, least: int, most: int) -> int:
        reserved.append((least, most))
        return most

    call.reserve = reserve
    for prompt in ([1, 2, 3], [4, 5]):
        client.generate({"prompt_token_ids": prompt}, SamplingParams(n=2, max_tokens=9), "request")
    assert reserved == [(3 + 2, 3 + 18), (3 + 18 + 2 + 2, 3 + 18 + 2 + 18)]
    assert call.cut_to is None


def test_a_request_that_may_reserve_less_generates_no_more_than_that(engine: Engine, call: GatedCall) -> None:
    client = GatedEngineClient(engine, key=KEY, experts=(), slot_map=ONE, answers=lambda: True, clock=engine.clock)
    reserved: list[tuple[int, int]] = []

    def reserve(*, least: int, most: int) -> int:
        reserved.append((least, most))
        return 3 + 15

    call.reserve = reserve
    params = SamplingParams(n=2, max_tokens=9, min_tokens=4)
    client.generate({"prompt_token_ids": [1, 2, 3]}, params, "request")
    assert reserved == [(3 + 8, 3 + 18)]
    assert (params.max_tokens, call.cut_to) == (7, 7)
    client.generate({"prompt_token_ids": [1]}, SamplingParams(max_tokens=2), "request")
    assert reserved[1:] == [(3 + 14 + 1 + 1, 3 + 14 + 1 + 2)]


def test_a_refused_reservation_refuses_the_request(engine: Engine, call: GatedCall) -> None:
    client = GatedEngineClient(engine, key=KEY, experts=(), slot_map=ONE, answers=lambda: True, clock=engine.clock)

    def refuse(*, least: int, most: int) -> int:
        raise OverflowError(least, most)

    call.reserve = refuse
    with pytest.raises(OverflowError):
        client.generate({"prompt_token_ids": [1]}, SamplingParams(max_tokens=9), "request")
    assert engine.children == []


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY], ids=lambda kind: kind.name)
async def test_a_call_that_is_stopped_gets_no_more_tokens_and_leaves_the_engine(
    engine: Engine, call: GatedCall, kind: RequestOutputKind
) -> None:
    reading = await begin(engine, call, kind, 2)
    engine.step(7)
    await asyncio.to_thread(engine.client.stop, call, "key_revoked")
    with pytest.raises(EngineGenerateError, match="key_revoked"):
        await asyncio.wait_for(reading, 10)
    assert call.failed == "key_revoked"
    assert engine.output_processor.request_states == {}


OUTPUTS = pytest.mark.parametrize(
    "kind", [RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY], ids=lambda kind: kind.name
)


@pytest.mark.asyncio
@OUTPUTS
async def test_a_call_leaves_the_engine_at_its_end_though_no_output_arrives(
    engine: Engine, call: GatedCall, kind: RequestOutputKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "LOOK_AGAIN_SECONDS", 0.001)
    reading = await begin(engine, call, kind, 2)
    for end, reason in ((math.inf, "later"), (1500.0, "key_expired"), (1900.0, "later")):
        await asyncio.to_thread(engine.client.end_at, call, end, reason)
    engine.clock.now = 1499.0
    await asyncio.sleep(0.02)
    assert call.failed is None
    assert len(engine.output_processor.request_states) == 2
    engine.clock.now = 1500.0
    with pytest.raises(EngineGenerateError, match="key_expired"):
        await asyncio.wait_for(reading, 10)
    assert call.failed == "key_expired"
    assert engine.output_processor.request_states == {}


@pytest.mark.asyncio
async def test_no_timer_outlives_its_call(engine: Engine, call: GatedCall) -> None:
    reading = await begin(engine, call, RequestOutputKind.DELTA, 1)
    engine.client.end_at(call, 1500.0, "key_expired")
    await asyncio.sleep(0)
    assert len(engine.client._timers) == 1
    engine.step(7, finish=True)
    await reading
    engine.client.end(call)
    engine.client.end_at(call, 1400.0, "key_expired")
    await asyncio.sleep(0)
    assert engine.client._timers == {}


@pytest.mark.asyncio
@OUTPUTS
@pytest.mark.parametrize(
    ("end", "sealed", "reason"), [(1500.0, 1500.0, "key_expired"), (2500.0, 2000.0, "gate_expired")]
)
async def test_the_engine_core_is_given_the_earlier_end_and_the_client_its_reason(
    engine: Engine, call: GatedCall, kind: RequestOutputKind, end: float, sealed: float, reason: str
) -> None:
    call.gate_until = 2000.0
    call.end_at(end, "key_expired")
    reading = await begin(engine, call, kind, 1)
    assert open_seal(engine.sealed[0], KEY).valid_until == sealed
    ended = EngineCoreOutput(engine.children[0], [], finish_reason=FinishReason.ERROR, stop_reason="gate_expired")
    engine.output_processor.process_outputs([ended])
    await asyncio.wait({reading}, timeout=10)
    assert call.failed == reason
    assert (reading.exception() is None) == (reason == "gate_expired")


@pytest.mark.asyncio
@pytest.mark.parametrize("reason", [CONSTRAINT_SLOW, CONSTRAINT_UNAVAILABLE])
async def test_a_constraint_that_was_slow_is_avoided_and_no_other_that_ended(
    engine: Engine, call: GatedCall, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    avoided: list[tuple[str, str]] = []

    async def constrain(_self: object, _tenant: str, _params: SamplingParams) -> str:
        return "constraint"

    monkeypatch.setattr(Constrainer, "constrain", constrain)
    monkeypatch.setattr(Constrainer, "avoid", lambda _, *slow: avoided.append(slow))
    constrained = StructuredOutputsParams(regex="a")
    reading = await begin(engine, call, RequestOutputKind.DELTA, 1, structured_outputs=constrained)
    ended = EngineCoreOutput(engine.children[0], [], finish_reason=FinishReason.ERROR, stop_reason=reason)
    engine.output_processor.process_outputs([ended])
    await asyncio.wait({reading}, timeout=10)
    assert call.failed == reason
    assert avoided == ([("t", "constraint")] if reason == CONSTRAINT_SLOW else [])


@pytest.mark.asyncio
async def test_an_end_is_judged_by_the_clock_that_does_not_go_back(engine: Engine, call: GatedCall) -> None:
    reading = await begin(engine, call, RequestOutputKind.DELTA, 1)
    engine.clock.now = 0.0
    engine.client.end_at(call, 5.0, "key_expired")  # long past by the machine's clock
    engine.step(7)
    await asyncio.sleep(0)
    assert call.failed is None
    engine.clock.now = 5.0
    engine.step(7)
    with pytest.raises(EngineGenerateError, match="key_expired"):
        await asyncio.wait_for(reading, 10)


@pytest.mark.asyncio
async def test_who_leaves_before_the_only_output_is_charged_for_what_there_was(engine: Engine, call: GatedCall) -> None:
    reading = await begin(engine, call, RequestOutputKind.FINAL_ONLY, 1)
    engine.step(7)
    reading.cancel()
    await asyncio.wait({reading})
    engine.step(8)
    assert call.tokens() == 4


@pytest.mark.asyncio
@pytest.mark.parametrize("n", [1, 3])
async def test_nothing_is_kept_of_a_request_that_did_not_reach_the_engine_core(
    engine: Engine, call: GatedCall, n: int
) -> None:
    engine.unreachable = True
    reading = await begin(engine, call, RequestOutputKind.DELTA, n)
    with pytest.raises(OverflowError):
        await reading
    assert len(engine.children) == n
    assert engine.output_processor.request_states == {}
    assert engine.output_processor.external_req_ids == {}


@pytest.mark.asyncio
async def test_more_bad_words_than_the_engine_has_room_for_are_refused_before_it_sees_them(
    engine: Engine, call: GatedCall
) -> None:
    client = GatedEngineClient(engine, key=KEY, experts=(), slot_map=ONE, answers=lambda: True, clock=engine.clock)
    for length, refused in ((1024, False), (1025, True)):
        params = SamplingParams(max_tokens=1, bad_words=["x" * length])
        outputs = client.generate({"prompt_token_ids": [1]}, params, "request")
        asking = asyncio.ensure_future(anext(outputs))
        await asyncio.sleep(0.01)
        if refused:
            with pytest.raises(VLLMValidationError, match=r"at most 1024 tokens, .* not 1025") as told:
                await asyncio.wait_for(asking, 10)
            assert told.value.parameter == "bad_words"
            assert client._running == {}
        else:
            assert engine.children
            asking.cancel()
            await asyncio.wait({asking})
        assert len(engine.children) == 1


def test_slots_that_were_found_are_forgotten_once_experts_change(engine: Engine) -> None:
    client = GatedEngineClient(engine, key=KEY, experts=(INFO,), slot_map=ONE, answers=lambda: True, clock=engine.clock)
    client.gates["one",] = (INFO.ref,)
    client.publish((replace(INFO, slot_epoch=INFO.slot_epoch + 1),), 2)
    assert client.gates == {}


def test_a_client_is_ready_while_its_engine_core_answers(engine: Engine) -> None:
    answers = [True, False, True]
    engine.errored = False
    client = GatedEngineClient(
        engine, key=KEY, experts=(), slot_map=ONE, answers=lambda: answers.pop(0), clock=engine.clock
    )
    assert not client.ready()
    client.mark_ready()
    assert [client.ready() for _ in range(3)] == [True, False, True]
    engine.errored = True
    assert not client.ready()


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY], ids=lambda kind: kind.name)
async def test_no_token_goes_on_before_it_is_recorded(engine: Engine, call: GatedCall, kind: RequestOutputKind) -> None:
    recorded, written = asyncio.Event(), list[int]()

    async def record() -> bool:
        await recorded.wait()
        written.append(call.tokens())
        return True

    call.record = record
    reading = await begin(engine, call, kind, 1)
    engine.step(7, finish=True)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not reading.done()
    recorded.set()
    await asyncio.wait_for(reading, 10)
    assert written == [4]


@pytest.mark.asyncio
@pytest.mark.parametrize("meanwhile", [None, "gate_expired"])
async def test_a_call_whose_tokens_cannot_be_recorded_ends_and_gives_none(
    engine: Engine, call: GatedCall, meanwhile: str | None
) -> None:
    """Also where its gate expires while they are being written."""

    async def record() -> bool:
        call.failed = meanwhile
        return False

    call.record = record
    reading = await begin(engine, call, RequestOutputKind.DELTA, 2)
    engine.step(7)
    with pytest.raises(EngineGenerateError, match="ledger_unavailable"):
        await asyncio.wait_for(reading, 10)
    assert call.failed == (meanwhile or "ledger_unavailable")
