from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgate.experts.checkpoint.layout import Architecture
from flexgate.experts.checkpoint.ownership import Ownership, Unit, unnamed
from flexgate.server.engine.frontend.checkpoint import Checkpoint, CheckpointError
from flexgate.server.engine.frontend.memory import SlotPlan, plan_slots
from flexgate.server.engine.worker.cache_usage import Remembered
from flexgate.server.engine.worker.slot_arrays import low_rank_experts

ARCHITECTURE = Architecture(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
)
SLOT = 2 * (3 * 64 * 128 + 64) * 2  # layers, FFN and router row, bytes of a bfloat16
OTHER = (2 * 4 * 64 * 64 + 2 * 1000 * 64) * 2
TOKEN = 2 * 2 * 64 * 2  # keys and values, layers, bytes of a bfloat16
KV = 100 * TOKEN


def attribution(slots: int) -> int:
    """Of the hundred positions that the KV cache has."""
    return 100 * 8 * (slots + 1)


def planned(available: int, **options: Any) -> SlotPlan:
    checkpoint = Checkpoint(Path("model"), ARCHITECTURE, unnamed((4, 4)), "bfloat16", {})
    return plan_slots(checkpoint, dtype="bfloat16", kv_bytes=KV, available_bytes=available, **options)


def test_two_slots_are_kept_free_where_there_is_room() -> None:
    plan = planned(1 << 30)
    assert (plan.slots, plan.held, plan.expert_bytes) == (6, 6, SLOT)
    assert plan.total_bytes == 6 * SLOT + OTHER + KV + attribution(6)


@pytest.mark.parametrize(("fitting", "slots"), [(6, 6), (5, 5), (4, 4)])
def test_free_slots_give_way_to_the_kv_cache(fitting: int, slots: int) -> None:
    room = OTHER + KV + fitting * SLOT + attribution(fitting)
    assert planned(room).slots == slots
    assert fitting == 4 or planned(room - 1).slots == slots - 1


def test_the_memory_of_low_rank_slots_is_that_of_the_arrays_that_are_made() -> None:
    plan = planned(1 << 30, low_ranks=(8, 8, 3))
    groups = low_rank_experts((8, 8, 3), torch.zeros(1, 64, 128, dtype=torch.bfloat16))
    assert plan.low_rank_bytes == 2 * sum(tensor.nbytes for group in groups for tensor in group.tensors)
    assert [len(group.a2_SRF) for group in groups] == [2, 1]
    assert (plan.slots, plan.low_ranks) == (6, (8, 8, 3))
    assert plan.total_bytes == 6 * SLOT + plan.low_rank_bytes + OTHER + KV + attribution(9)


def test_a_slot_of_rank_64_is_under_three_percent_of_a_full_one() -> None:
    """FlexOlmo-7B's layer: hidden 4096, intermediate 11008."""
    large = replace(ARCHITECTURE, hidden_size=4096, intermediate_size=11008)
    checkpoint = Checkpoint(Path("model"), large, unnamed((4, 4)), "bfloat16", {})
    plan = plan_slots(checkpoint, dtype="bfloat16", kv_bytes=KV, available_bytes=1 << 40, low_ranks=(64,))
    assert plan.low_rank_bytes / plan.expert_bytes < 0.03


def test_low_rank_slots_take_bits_of_gates_and_are_named_where_memory_is_short() -> None:
    with pytest.raises(CheckpointError, match="serves at most 60"):
        planned(1 << 30, max_experts=61, low_ranks=(8,) * 4)
    with pytest.raises(CheckpointError, match=r"of shared weights \+ 73.7 kB of low-rank slots \+ 51.2 kB of KV cache"):
        planned(OTHER + KV, low_ranks=(8,) * 4)


def test_a_model_that_does_not_fit_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(CheckpointError) as refused:
        planned(OTHER + KV + 3 * SLOT + attribution(3))
    assert str(refused.value) == (
        "4 experts of 98.6 kB + 321.5 kB of shared weights + 51.2 kB of KV cache + 4.0 kB of its attribution "
        "= 771.0 kB do not fit into 671.6 kB"
    )


@pytest.mark.parametrize("slots", [3, 65])
def test_fewer_slots_than_experts_and_more_than_a_gate_names_are_refused(slots: int) -> None:
    with pytest.raises(CheckpointError, match=f"--max-experts {slots}: the checkpoint has 4 experts"):
        planned(1 << 30, max_experts=slots)


@pytest.mark.parametrize("slots", [6, 64])
def test_what_is_remembered_of_cached_positions_is_counted_as_it_is_allocated(slots: int) -> None:
    memory = Remembered.of(25, 4, slots, torch.device("cpu"))
    allocated = memory.mass_PU.nbytes + memory.chosen_P.nbytes
    assert planned(1 << 30, max_experts=slots).attribution_bytes == allocated
    assert planned(1 << 30, max_experts=slots, prefix_caching=False).attribution_bytes == 0


def test_slots_asked_for_are_not_reduced() -> None:
    with pytest.raises(CheckpointError, match="8 experts of"):
        planned(OTHER + KV + 8 * SLOT + attribution(8) - 1, max_experts=8)


def test_tensor_parallel_ranks_hold_a_part_of_every_slot() -> None:
    plan = planned(1 << 30, ranks=2)
    assert (plan.slots, plan.held, plan.expert_bytes) == (6, 6, SLOT // 2)


@pytest.mark.parametrize(("slots", "held"), [(4, 3), (6, 4), (7, 5)])
def test_expert_parallel_ranks_hold_their_share_and_a_zero_slot(slots: int, held: int) -> None:
    options = {"max_experts": slots, "ranks": 2, "expert_parallel": True}
    room = OTHER // 2 + KV + held * SLOT + 2 * attribution(slots)
    plan = planned(room, **options)
    assert (plan.slots, plan.held, plan.expert_bytes) == (slots, held, SLOT)
    with pytest.raises(CheckpointError, match=f"{held} experts of"):
        planned(room - 1, **options)


def owned(unit_LE: tuple[bytes, ...], units: int, **architecture: int) -> Checkpoint:
    """A checkpoint whose experts belong to so many units."""
    names = ("public", *(f"unit-{number}" for number in range(1, units)))
    ownership = Ownership(tuple(Unit(name, "owner", "") for name in names), unit_LE)
    return Checkpoint(Path("model"), replace(ARCHITECTURE, **architecture), ownership, "bfloat16", {})


@pytest.mark.parametrize(
    ("unit_LE", "units", "held"),
    [
        ((b"\0\1\1\1", b"\0\0\1\1"), 2, 6),  # two slots more, an expert each
        ((b"\0\1\2\3", b"\4\5\4\5"), 6, 6),  # more units than a layer has experts
    ],
)
def test_a_free_slot_costs_an_expert_of_every_layer(unit_LE: tuple[bytes, ...], units: int, held: int) -> None:
    checkpoint, options = owned(unit_LE, units), {"dtype": "bfloat16", "kv_bytes": KV}
    plan = plan_slots(checkpoint, available_bytes=1 << 30, **options)  # type: ignore[arg-type]
    assert (plan.slots, plan.held) == (units + 2, held)
    room = OTHER + KV + (held - 1) * SLOT + attribution(units + 1)
    fitting = plan_slots(checkpoint, available_bytes=room, **options)  # type: ignore[arg-type]
    assert (fitting.slots, fitting.held) == (units + 1, held - 1)


@pytest.mark.parametrize(("experts", "slots"), [(510, 4), (511, 3), (512, 2)])
def test_a_layer_has_no_more_experts_than_can_be_routed(experts: int, slots: int) -> None:
    checkpoint = owned((bytes([0, *([1] * (experts - 1))]),) * 2, 2, num_experts=experts)
    options: dict[str, Any] = {"dtype": "bfloat16", "kv_bytes": KV, "available_bytes": 1 << 40}
    assert plan_slots(checkpoint, **options).slots == slots
    with pytest.raises(CheckpointError, match=f"flexgate serves at most {slots}"):
        plan_slots(checkpoint, max_experts=slots + 1, **options)
