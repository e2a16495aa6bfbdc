"""Experts that come and go in the running engine, bit for bit where nothing may change."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from enginekit.checkpoints import expert_ticket, rewrite
from enginekit.compare import same_bits
from enginekit.scripted import Ask, EngineScript, ScriptedEngine, SlotChange, scripted_engine

from flexgate.experts.package.weights import WeightsTicket

pytestmark = pytest.mark.engine

NEW = 3  # the slot that the fourth expert of the whole checkpoint gets
SLOTS = 6
ZERO_DIGEST_OF = 5  # a slot that nothing is ever written into
GATES = [gate for size in range(1, 5) for gate in combinations(range(4), size)]
WITH_NEW = [gate for gate in GATES if NEW in gate]
WITHOUT_NEW = [gate for gate in GATES if NEW not in gate]


@pytest.fixture(scope="module")
def ticket(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> WeightsTicket:
    """The fourth expert of the checkpoint on its own."""
    return expert_ticket(checkpoint, NEW, tmp_path_factory.mktemp("expert"))


@pytest.fixture(scope="module")
def smaller(checkpoint: Path, moe_kernels: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedEngine]:
    """An engine that started with the first three experts and six slots."""
    reduced = rewrite(checkpoint, tmp_path_factory.mktemp("reduced"), [0, 1, 2])
    with scripted_engine(EngineScript(reduced, max_experts=SLOTS, settings={"moe_kernels": moe_kernels})) as running:
        yield running


@pytest.fixture
def slot_epoch(smaller: ScriptedEngine, ticket: WeightsTicket, request: pytest.FixtureRequest) -> Iterator[int]:
    """The fourth expert, hot-added for one test; its slot epoch."""
    number = 100 + len(request.session.items) + request.session.items.index(request.node)
    smaller.change(*add(ticket, number))
    yield number
    smaller.change(*revoke())


def add(ticket: WeightsTicket, slot_epoch: int, steps: tuple[int, int] = (0, 0)) -> list[SlotChange]:
    """Begin to fill before the first of ``steps``, open before the second."""
    begin, live = steps
    return [
        SlotChange(begin, "fill", NEW, ticket=ticket),
        SlotChange(live, "settle", NEW),
        SlotChange(live, "open", NEW, slot_epoch),
    ]


def revoke(step: int = 0) -> list[SlotChange]:
    return [SlotChange(step, "close", NEW), SlotChange(step, "clear", NEW), SlotChange(step, "settle", NEW)]


def crowd(gates: list[tuple[int, ...]], tokens: int = 6) -> list[Ask]:
    return [
        Ask(tuple(20 + 7 * i + t for t in range(25 + i)), gate, max_tokens=tokens + i % 4, at_step=i // 3)
        for i, gate in enumerate(gates)
    ]


def test_a_hot_added_expert_equals_a_statically_merged_checkpoint(
    smaller: ScriptedEngine, engine: ScriptedEngine, slot_epoch: int
) -> None:
    engine.reset_cache()
    smaller.reset_cache()
    merged, added = engine.run(crowd(GATES)), smaller.run(crowd(GATES))
    assert all(same_bits(one, other) for one, other in zip(merged, added, strict=True))
    assert engine.call("digests")[0][NEW] == smaller.call("digests")[0][NEW]


def test_requests_that_do_not_use_an_expert_see_no_bit_of_its_coming_and_going(
    smaller: ScriptedEngine, ticket: WeightsTicket
) -> None:
    script = crowd(WITHOUT_NEW * 2, tokens=12)
    smaller.reset_cache()
    quiet = smaller.run(script)
    smaller.reset_cache()
    changes = [*add(ticket, 71, (2, 4)), *revoke(7), *add(ticket, 72, (8, 9)), *revoke(11)]
    busy = smaller.run(script, changes)
    assert all(same_bits(one, other) for one, other in zip(quiet, busy, strict=True))
    assert [answer.cached for answer in quiet] == [answer.cached for answer in busy]


def test_a_revoke_ends_its_users_and_nobody_else(smaller: ScriptedEngine, ticket: WeightsTicket) -> None:
    script = [replace(ask, at_step=0, max_tokens=20) for ask in crowd(GATES)]
    smaller.reset_cache()
    answers = smaller.run(script, [*add(ticket, 81), *revoke(8)])
    for ask, answer in zip(script, answers, strict=True):
        if NEW in ask.gate:
            assert (answer.finish_reason, answer.stop_reason) == ("error", "expert_revoked")
            assert 0 < len(answer.tokens) < 20
        else:
            assert (answer.finish_reason, len(answer.tokens)) == ("length", 20)
    assert smaller.call("leftovers") == (0, 0)


LONG = tuple(2 + (5 * t) % 400 for t in range(300))


def test_no_prefix_computed_with_a_revoked_expert_is_hit_again(smaller: ScriptedEngine, ticket: WeightsTicket) -> None:
    users, others = Ask(LONG, (0, NEW)), Ask(LONG, (0, 1))
    smaller.reset_cache()
    smaller.change(*add(ticket, 91))
    assert [smaller.solo(ask).cached > 0 for ask in (users, others, users, others)] == [False, False, True, True]
    closed, *_ = smaller.change(*revoke())
    assert closed["evicted_blocks"] > 0
    smaller.change(*add(ticket, 92))
    assert smaller.solo(others).cached > 0
    assert smaller.solo(users).cached == 0
    smaller.change(*revoke())


def test_evicted_blocks_are_gone_whatever_the_salt_says(smaller: ScriptedEngine, ticket: WeightsTicket) -> None:
    """The same slot epoch, hence the same salt: only the eviction stands between."""
    users = Ask(LONG, (0, NEW))
    smaller.reset_cache()
    smaller.change(*add(ticket, 93))
    assert [smaller.solo(users).cached > 0 for _ in range(2)] == [False, True]
    smaller.change(*revoke(), *add(ticket, 93))
    assert smaller.solo(users).cached == 0
    smaller.change(*revoke())


def test_a_gate_of_the_former_assignment_is_refused(smaller: ScriptedEngine, slot_epoch: int) -> None:
    stale = Ask((5, 6, 7), (0, NEW), epochs={NEW: slot_epoch - 1})
    with pytest.raises(RuntimeError, match="no longer loaded"):
        smaller.solo(stale)
    assert smaller.solo(replace(stale, epochs=None)).finish_reason == "length"


def test_a_cleared_slot_is_what_it_was_before_anything_was_in_it(
    smaller: ScriptedEngine, ticket: WeightsTicket
) -> None:
    _, filled, _ = smaller.change(*add(ticket, 95))
    *_, cleared = smaller.change(*revoke())
    (digests,) = smaller.call("digests")
    assert filled != cleared
    assert cleared == [digests[NEW]] == [digests[ZERO_DIGEST_OF]]


def test_a_file_that_changed_after_its_check_is_not_loaded(
    smaller: ScriptedEngine, ticket: WeightsTicket, tmp_path: Path
) -> None:
    swapped = tmp_path / "expert.safetensors"
    data = bytearray(ticket.path.read_bytes())
    data[-7] ^= 1
    swapped.write_bytes(data)
    with pytest.raises(RuntimeError, match="DigestMismatch"):
        smaller.change(SlotChange(0, "fill", NEW, ticket=replace(ticket, path=swapped)), SlotChange(0, "settle", NEW))
    smaller.change(SlotChange(0, "clear", NEW), SlotChange(0, "settle", NEW))


def test_a_live_slot_is_neither_written_nor_cleared(smaller: ScriptedEngine, ticket: WeightsTicket) -> None:
    for change in (SlotChange(0, "fill", 1, ticket=ticket), SlotChange(0, "clear", 1)):
        with pytest.raises(RuntimeError, match="slot 1 is live"):
            smaller.change(change)


def test_the_anchor_is_never_closed(smaller: ScriptedEngine) -> None:
    with pytest.raises(RuntimeError, match="anchor"):
        smaller.change(SlotChange(0, "close", 0))


VARIANTS = {
    "runner-v2": EngineScript(Path(), max_experts=SLOTS, interpret_triton=True),
    "two-ranks": EngineScript(
        Path(),
        max_experts=SLOTS,
        settings={"tensor_parallel_size": 2},
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    ),
    "two-ranks-whole-experts": EngineScript(
        Path(),
        max_experts=SLOTS,
        settings={"tensor_parallel_size": 2, "enable_expert_parallel": True},
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    ),
    "bfloat16": EngineScript(Path(), max_experts=SLOTS, settings={"dtype": "bfloat16"}),
}


@pytest.mark.slow
@pytest.mark.sliced(2)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_experts_come_and_go_alike_on_other_engines(
    checkpoint: Path, ticket: WeightsTicket, tmp_path: Path, variant: EngineScript
) -> None:
    reduced = rewrite(checkpoint, tmp_path, [0, 1, 2])
    bystanders = crowd(WITHOUT_NEW, tokens=12)
    with scripted_engine(replace(variant, model=reduced)) as running:
        quiet = running.run(bystanders)
        running.reset_cache()
        busy = running.run(bystanders, [*add(ticket, 71, (2, 4)), *revoke(6), *add(ticket, 72, (7, 9))])
        running.reset_cache()
        added = running.run(crowd(GATES))
        digests = running.call("digests")
    assert all(same_bits(one, other) for one, other in zip(quiet, busy, strict=True))
    with scripted_engine(replace(variant, model=checkpoint)) as merged:
        static = merged.run(crowd(GATES))
        assert merged.call("digests") == digests
    assert all(same_bits(one, other) for one, other in zip(static, added, strict=True))
