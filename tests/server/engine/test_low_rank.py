"""Low-rank experts in slots of their own, beside full ones: added, mixed in a batch, excluded, revoked, refused."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from enginekit.checkpoints import expert_ticket, rewrite
from enginekit.compare import agree, same_bits
from enginekit.ranks import compute_with_factors, compute_without_factors
from enginekit.scripted import Ask, EngineScript, ScriptedEngine, SlotChange, scripted_engine
from safetensors.torch import load_file, save_file

from flexgate.experts.checkpoint.layout import EXPERT_KEYS
from flexgate.experts.package.size import ExpertSize
from flexgate.experts.package.weights import WeightsTicket, open_weights

pytestmark = [pytest.mark.engine, pytest.mark.slow]

FREE, LOW, ALSO_LOW, SMALL = 2, 3, 4, 5  # slots: full, rank 6, rank 6, rank 2
RANK = 6
GATES = [(0, *rest) for size in range(4) for rest in combinations((1, FREE, LOW), size)]
SETTINGS = {"moe_kernels": "flexgate", "low_ranks": (RANK, RANK, 2)}


@pytest.fixture(scope="module")
def engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedEngine]:
    """Public and one more full expert of the checkpoint, a free full slot, and three low-rank slots."""
    reduced = rewrite(checkpoint, tmp_path_factory.mktemp("reduced"), [0, 1])
    with scripted_engine(EngineScript(reduced, max_experts=3, settings=SETTINGS)) as running:
        yield running


@pytest.fixture(scope="module")
def low(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> WeightsTicket:
    """The last expert of the whole checkpoint, at the rank of two slots."""
    return expert_ticket(checkpoint, 3, tmp_path_factory.mktemp("low"), ExpertSize(rank=RANK))


@pytest.fixture(scope="module")
def small(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> WeightsTicket:
    """The same expert, at rank 2."""
    return expert_ticket(checkpoint, 3, tmp_path_factory.mktemp("small"), ExpertSize(rank=2))


@pytest.fixture(scope="module")
def full(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> WeightsTicket:
    """The third expert, full."""
    return expert_ticket(checkpoint, 2, tmp_path_factory.mktemp("full"))


def add(slot: int, ticket: WeightsTicket, slot_epoch: int, steps: tuple[int, int] = (0, 0)) -> list[SlotChange]:
    """Begin to fill before the first of ``steps``, open before the second."""
    begin, live = steps
    return [
        SlotChange(begin, "fill", slot, ticket=ticket),
        SlotChange(live, "settle", slot),
        SlotChange(live, "open", slot, slot_epoch),
    ]


def revoke(slot: int, step: int = 0) -> list[SlotChange]:
    return [SlotChange(step, "close", slot), SlotChange(step, "clear", slot), SlotChange(step, "settle", slot)]


@pytest.fixture
def loaded(engine: ScriptedEngine, low: WeightsTicket, full: WeightsTicket) -> Iterator[ScriptedEngine]:
    """Both added for one test."""
    engine.change(*add(FREE, full, 101), *add(LOW, low, 102))
    engine.reset_cache()
    yield engine
    engine.change(*revoke(FREE), *revoke(LOW))


def crowd(gates: Sequence[tuple[int, ...]], tokens: int = 5) -> list[Ask]:
    return [
        Ask(tuple(20 + 7 * i + t for t in range(12 + i)), gate, max_tokens=tokens + i % 3, at_step=i // 3)
        for i, gate in enumerate(gates)
    ]


def merged(checkpoint: Path, low: WeightsTicket, target: Path) -> Path:
    """The whole checkpoint with its last expert as a merge writes it: the public one and the products."""
    rewrite(checkpoint, target, [0, 1, 2, 3])
    tensors = load_file(target / "model.safetensors")
    with open_weights(low) as weights:
        for layer in range(weights.layers):
            for key, factors in zip(EXPERT_KEYS, weights.low_rank_layer(layer).factors, strict=True):
                public = tensors[key.format(layer=layer, expert=0)]
                tensors[key.format(layer=layer, expert=3)] = public + factors.product()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_one_batch_of_full_and_low_rank_experts_answers_as_the_merged_checkpoint(
    loaded: ScriptedEngine, checkpoint: Path, low: WeightsTicket, tmp_path: Path
) -> None:
    script = crowd(GATES)
    kept = loaded.run(script)
    whole = merged(checkpoint, low, tmp_path / "merged")
    with scripted_engine(EngineScript(whole, settings={"moe_kernels": "flexgate"})) as running:
        expected = running.run(script)
    assert all(agree(want, got) for want, got in zip(expected, kept, strict=True))
    assert any(answer.mass[LOW] for answer in kept)


def test_a_mixed_batch_equals_solo_runs(loaded: ScriptedEngine) -> None:
    script = crowd(GATES)
    together = loaded.run(script)
    loaded.reset_cache()
    for ask, answer in zip(script, together, strict=True):
        assert agree(loaded.solo(replace(ask, at_step=0)), answer)


@pytest.mark.parametrize("kind", ["nan", "-1e30", "random"])
def test_what_an_excluded_low_rank_slot_holds_changes_no_bit(loaded: ScriptedEngine, kind: str) -> None:
    script = crowd([gate for gate in GATES if LOW not in gate] * 2)
    before = loaded.run(script)
    loaded.overwrite([LOW, ALSO_LOW, SMALL], kind)
    try:
        loaded.reset_cache()
        after = loaded.run(script)
    finally:
        loaded.restore()
    assert all(same_bits(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", ["nan", "random"])
def test_what_excluded_full_slots_hold_changes_no_bit_of_a_low_rank_expert(loaded: ScriptedEngine, kind: str) -> None:
    script = crowd([(0, LOW)] * 6)
    before = loaded.run(script)
    loaded.overwrite([1, FREE, ALSO_LOW, SMALL], kind)
    try:
        loaded.reset_cache()
        after = loaded.run(script)
    finally:
        loaded.restore()
    assert all(same_bits(one, other) for one, other in zip(before, after, strict=True))


def test_excluding_a_low_rank_expert_equals_an_engine_without_such_slots(
    loaded: ScriptedEngine, checkpoint: Path, tmp_path: Path
) -> None:
    script = crowd([gate for gate in GATES if LOW not in gate] * 2)
    excluded = loaded.run(script)
    without = rewrite(checkpoint, tmp_path / "without", [0, 1, 2])
    with scripted_engine(EngineScript(without, max_experts=3, settings={"moe_kernels": "flexgate"})) as running:
        removed = running.run(script)
    assert all(same_bits(one, other) for one, other in zip(excluded, removed, strict=True))


def test_the_place_of_a_low_rank_expert_changes_no_bit(loaded: ScriptedEngine, low: WeightsTicket) -> None:
    script = crowd([(0, 1, LOW), (0, LOW)] * 3)
    first = loaded.run(script)
    loaded.change(*add(ALSO_LOW, low, 103))
    try:
        loaded.reset_cache()
        second = loaded.run([replace(ask, gate=(*ask.gate[:-1], ALSO_LOW)) for ask in script])
    finally:
        loaded.change(*revoke(ALSO_LOW))
    assert all(same_bits(one, other) for one, other in zip(first, second, strict=True))


def test_a_smaller_rank_has_the_same_bits_in_a_larger_slot(engine: ScriptedEngine, small: WeightsTicket) -> None:
    engine.change(*add(LOW, small, 111), *add(SMALL, small, 112))
    try:
        engine.reset_cache()
        larger, exact = (engine.run(crowd([(0, 1, slot), (0, slot)] * 2)) for slot in (LOW, SMALL))
    finally:
        engine.change(*revoke(LOW), *revoke(SMALL))
    assert all(same_bits(*pair) for pair in zip(larger, exact, strict=True))


def test_requests_that_do_not_use_a_low_rank_expert_see_no_bit_of_its_coming_and_going(
    engine: ScriptedEngine, low: WeightsTicket
) -> None:
    script = crowd([(0,), (0, 1), (0, 1), (0,)] * 2, tokens=12)
    engine.reset_cache()
    quiet = engine.run(script)
    engine.reset_cache()
    changes = [*add(LOW, low, 121, (2, 4)), *revoke(LOW, 7), *add(LOW, low, 122, (8, 9)), *revoke(LOW, 11)]
    busy = engine.run(script, changes)
    assert all(same_bits(one, other) for one, other in zip(quiet, busy, strict=True))


def test_a_revoked_low_rank_expert_ends_its_users_and_leaves_zeros(engine: ScriptedEngine, low: WeightsTicket) -> None:
    empty = engine.call("digests")[0]
    assert empty[LOW] == empty[ALSO_LOW] != empty[SMALL]
    script = [Ask((5, 6, 7), gate, max_tokens=20) for gate in ((0,), (0, LOW))]
    engine.reset_cache()
    others, users = engine.run(script, [*add(LOW, low, 131), *revoke(LOW, 8)])
    assert (users.finish_reason, users.stop_reason) == ("error", "expert_revoked")
    assert (others.finish_reason, len(others.tokens)) == ("length", 20)
    assert engine.call("digests")[0] == empty


def test_what_a_slot_has_no_room_for_is_refused_and_not_written(
    engine: ScriptedEngine, low: WeightsTicket, full: WeightsTicket
) -> None:
    empty = engine.call("digests")
    for slot, ticket, message in (
        (LOW, full, f"slot {LOW} is of rank {RANK}; the expert is full"),
        (FREE, low, f"slot {FREE} is full; the expert is of rank {RANK}"),
        (SMALL, low, f"slot {SMALL} has room for rank 2; the expert is of rank {RANK}"),
    ):
        with pytest.raises(RuntimeError, match=message):
            engine.change(SlotChange(0, "fill", slot, ticket=ticket), SlotChange(0, "settle", slot))
    assert engine.call("digests") == empty


def test_a_process_that_holds_factors_and_does_not_compute_with_them_is_found(engine: ScriptedEngine) -> None:
    engine.call("on_every_rank", compute_without_factors)
    try:
        (report,) = engine.call("handshake")
    finally:
        engine.call("on_every_rank", compute_with_factors)
    assert report["low_ranks"] == ["layers differ"]
    assert engine.call("handshake")[0]["low_ranks"] == [RANK, RANK, 2]


def test_every_process_says_which_ranks_it_has_room_for(engine: ScriptedEngine) -> None:
    (report,) = engine.call("handshake")
    assert report["low_ranks"] == [RANK, RANK, 2]
    assert report["experts_here"] == list(range(6))


def test_what_is_routed_to_each_size_counts_for_its_slot(
    engine: ScriptedEngine, checkpoint: Path, low: WeightsTicket, tmp_path: Path
) -> None:
    narrow = expert_ticket(checkpoint, 2, tmp_path, ExpertSize(width=24))
    engine.change(*add(FREE, narrow, 141), *add(LOW, low, 142))
    try:
        engine.reset_cache()
        answers = engine.run(crowd([(0, 1, FREE, LOW)] * 6))
    finally:
        engine.change(*revoke(FREE), *revoke(LOW))
    assert all(sum(answer.mass[slot] for answer in answers) > 0 for slot in (1, FREE, LOW))
    for answer in answers:
        assert answer.mass[ALSO_LOW] == answer.mass[SMALL] == 0


def test_an_added_low_rank_expert_is_attributed_to_its_own_slot(loaded: ScriptedEngine) -> None:
    """What is routed to it counts for its owner alone, although the public expert is in it."""
    (answer,) = loaded.run(crowd([(0, LOW)]))
    public, own = answer.mass[0], answer.mass[LOW]
    assert own > 0
    assert sum(answer.mass) == public + own
    assert torch.tensor(answer.mass)[[1, FREE, ALSO_LOW, SMALL]].eq(0).all()
