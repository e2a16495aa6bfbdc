"""What a slot outside the gate holds changes nothing, and excluding a slot equals removing it: bit for bit.

Shape suffixes: T tokens, E expert slots, K chosen experts.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

POISONS = [float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 3.4e38]


def compacted(gate: int, logits_E: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """The router of a model that never had the excluded slots: logits, full gate, and where each slot came from."""
    kept = [slot for slot in range(len(logits_E)) if gate >> slot & 1]
    # Every bit set is −1 in two's complement; bits beyond the slots must be ignored.
    return logits_E[kept][None], torch.tensor([-1]), kept


def assert_exclusion_equals_removal(route: Any, logits_E: Tensor, gate: int, **arguments: Any) -> None:
    hole = route(logits_E[None], torch.tensor([gate]), **arguments)
    logits_1R, gate_1, kept = compacted(gate, logits_E)
    removed = route(logits_1R, gate_1, **arguments)
    assert torch.equal(hole.weights_TK.view(torch.int32), removed.weights_TK.view(torch.int32))
    assert hole.ids_TK.tolist() == [[kept[slot] if slot >= 0 else -1 for slot in removed.ids_TK[0].tolist()]]
    assert hole.mass_TU[0, kept].tolist() == removed.mass_TU[0].tolist()
    assert hole.mass_TU.sum() == removed.mass_TU.sum()
    unsigned = int(hole.chosen_T) & (2**64 - 1)
    assert unsigned == sum(1 << kept[rank] for rank in range(len(kept)) if int(removed.chosen_T) >> rank & 1)


@pytest.mark.parametrize("slots", [2, 7, 9, 64])
@pytest.mark.parametrize("renormalize", [False, True])
def test_exclusion_equals_removal(route: Any, random_gate: Any, slots: int, renormalize: bool) -> None:
    torch.manual_seed(slots)
    for gate in random_gate(5, slots).tolist():
        arguments = {"top_k": min(5, slots), "renormalize": renormalize, "fill": "none"}
        assert_exclusion_equals_removal(route, torch.randn(slots) * 4, gate, **arguments)


@settings(max_examples=25)
@given(
    logits=st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=12),
    gate=st.integers(1, 2**12 - 1),
    top_k=st.integers(1, 8),
    renormalize=st.booleans(),
)
@pytest.mark.parametrize("name", ["native", "numpy", "kernel"])
def test_exclusion_equals_removal_for_any_logits(
    routers: Any, name: str, logits: list[float], gate: int, top_k: int, renormalize: bool
) -> None:
    gate = gate % (1 << len(logits)) or 1
    arguments = {"top_k": top_k, "renormalize": renormalize, "fill": "none"}
    assert_exclusion_equals_removal(routers[name], torch.tensor(logits), gate, **arguments)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("slots", [7, 64])
def test_poison_in_excluded_slots_changes_no_bit(route: Any, random_gate: Any, slots: int, poison: float) -> None:
    torch.manual_seed(slots)
    logits_TE, gate_T, bias_E = torch.randn(13, slots), random_gate(13, slots), torch.randn(slots)
    allowed_TE = ((gate_T[:, None] >> torch.arange(slots)) & 1).bool()
    clean = route(logits_TE, gate_T, top_k=3, bias_E=bias_E)
    assert clean.same_bits(route(torch.where(allowed_TE, logits_TE, poison), gate_T, top_k=3, bias_E=bias_E))
    assert bool((clean.mass_TU[~allowed_TE] == 0).all())


@pytest.mark.parametrize("poison", POISONS)
def test_poisoned_bias_of_an_excluded_slot_changes_no_bit(route: Any, poison: float) -> None:
    torch.manual_seed(0)
    logits_TE, bias_E = torch.randn(7, 7), torch.randn(7)
    clean = route(logits_TE, torch.full((7,), 0b1011011), bias_E=bias_E)
    bias_E[[2, 5]] = poison
    assert clean.same_bits(route(logits_TE, torch.full((7,), 0b1011011), bias_E=bias_E))


@pytest.mark.parametrize("slots", [1, 7, 63])
def test_gate_bits_beyond_the_slots_are_ignored(route: Any, random_gate: Any, slots: int) -> None:
    torch.manual_seed(slots)
    logits_TE, gate_T = torch.randn(7, slots), random_gate(7, slots)
    beyond = -1 << slots
    for fill in ("none", "first"):
        plain = route(logits_TE, gate_T, top_k=5, fill=fill)
        assert plain.same_bits(route(logits_TE, gate_T | beyond, top_k=5, fill=fill))


def test_all_but_one_masked_gives_that_one_the_whole_weight(route: Any) -> None:
    torch.manual_seed(1)
    for slot in range(9):
        routed = route(torch.randn(7, 9) * 50, torch.full((7,), 1 << slot), top_k=4)
        assert bool((routed.ids_TK == slot).all())
        assert routed.weights_TK.tolist() == [[1.0, 0.0, 0.0, 0.0]] * 7


def test_an_allowed_slot_whose_probability_underflows_still_outranks_an_excluded_one(route: Any) -> None:
    logits_TE = torch.tensor([[5.0, 0.0, -300.0, 7.0, -300.0]])
    routed = route(logits_TE, torch.tensor([0b11100]), top_k=3, fill="none")
    assert routed.ids_TK.tolist() == [[3, 2, 4]]
    assert routed.weights_TK.tolist() == [[1.0, 0.0, 0.0]]
    assert int(routed.chosen_T) == 0b11100


@pytest.mark.parametrize("corrupt", [float("nan"), float("inf")])
def test_a_corrupt_allowed_slot_spoils_the_token_but_never_widens_its_gate(route: Any, corrupt: float) -> None:
    logits_TE = torch.tensor([[9.0, 0.0, corrupt, 1.0, 2.0], [9.0, 0.0, 0.0, 1.0, 2.0]])
    routed = route(logits_TE, torch.tensor([0b10110, 0b10110]), top_k=2, fill="none")
    assert routed.ids_TK.tolist()[0] == [1, 2]
    assert bool(routed.weights_TK[0].isnan().all())
    assert routed.mass_TU[0].tolist() == [0] * 5
    assert bool(routed.weights_TK[1].isfinite().all())


@pytest.mark.parametrize(("fill", "expected"), [("none", -1), ("first", 0), (4, 4)])
def test_a_token_that_is_allowed_nothing_gets_no_weight(route: Any, fill: Any, expected: int) -> None:
    torch.manual_seed(2)
    logits_TE = torch.randn(3, 7)
    routed = route(logits_TE, torch.tensor([0b101, 0, 0b1111111]), top_k=3, renormalize=True, fill=fill)
    assert routed.ids_TK[1].tolist() == [expected] * 3
    assert routed.weights_TK[1].tolist() == [0.0] * 3
    assert routed.mass_TU[1].tolist() == [0] * 7
    assert int(routed.chosen_T[1]) == 0
    neighbours = route(logits_TE[::2], torch.tensor([0b101, 0b1111111]), top_k=3, renormalize=True, fill=fill)
    assert torch.equal(routed.weights_TK[::2], neighbours.weights_TK)


def test_a_token_is_routed_the_same_alone_and_in_any_batch(route: Any, random_gate: Any) -> None:
    torch.manual_seed(4)
    logits_TE, gate_T = torch.randn(300, 9) * 5, random_gate(300, 9)
    together = route(logits_TE, gate_T, top_k=3, renormalize=True)
    for token in (0, 1, 31, 32, 63, 64, 255, 299):
        alone = route(logits_TE[token : token + 1], gate_T[token : token + 1], top_k=3, renormalize=True)
        assert torch.equal(alone.weights_TK[0].view(torch.int32), together.weights_TK[token].view(torch.int32))
        assert torch.equal(alone.ids_TK[0], together.ids_TK[token])
