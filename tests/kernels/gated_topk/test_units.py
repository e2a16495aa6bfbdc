"""A gate names units, a layer maps its experts to them: who is admitted, who is counted, what has no order.

Shape suffixes: T tokens, E experts of the layer, U units, K chosen experts.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgate.kernels.errors import KernelArgumentError
from flexgate.kernels.gated_topk import CLOSED_GATE, COMMON_UNIT, MASS_SCALE, MAX_UNITS, unit_map

SIZES = [8, 64, 128, pytest.param(512, marks=pytest.mark.slow)]


def signed(gate: int) -> int:
    """The int64 with the bits of a gate."""
    return gate - 2**64 if gate >> 63 else gate


def draw_map(experts: int) -> Tensor:
    """A random map in which the common unit and unit 63 have an expert."""
    unit_E = torch.randint(MAX_UNITS, (experts,), dtype=torch.uint8)
    unit_E[torch.randperm(experts)[:2]] = torch.tensor([COMMON_UNIT, 63], dtype=torch.uint8)
    return unit_E


def draw_gate() -> int:
    """A random gate with the common unit."""
    drawn = [unit for unit in range(MAX_UNITS) if torch.rand(()) < 0.4]
    return sum(1 << unit for unit in {COMMON_UNIT, *drawn})


def assert_exclusion_equals_removal(route: Any, logits_E: Tensor, unit_E: Tensor, gate: int, **arguments: Any) -> None:
    kept = [expert for expert, unit in enumerate(unit_E.tolist()) if gate >> unit & 1]
    poisoned_E = torch.full_like(logits_E, float("nan"))
    poisoned_E[kept] = logits_E[kept]
    hole = route(poisoned_E[None], torch.tensor([signed(gate)]), unit_E=unit_E, **arguments)
    # Every bit set is −1 in two's complement.
    removed = route(logits_E[kept][None], torch.tensor([-1]), unit_E=unit_E[kept], **arguments)
    assert torch.equal(hole.weights_TK.view(torch.int32), removed.weights_TK.view(torch.int32))
    assert hole.ids_TK.tolist() == [[kept[slot] if slot >= 0 else -1 for slot in removed.ids_TK[0].tolist()]]
    assert torch.equal(hole.mass_TU, removed.mass_TU)
    assert torch.equal(hole.chosen_T, removed.chosen_T)


@pytest.mark.parametrize("experts", SIZES)
def test_routing_by_units_equals_the_reference(route: Any, specified: Any, experts: int) -> None:
    torch.manual_seed(experts)
    for top_k, renormalize in ((1, False), (4, True), (8, False)):
        logits_TE, bias_E, unit_E = torch.randn(3, experts) * 3, torch.randn(experts), draw_map(experts)
        gate_T = torch.tensor([CLOSED_GATE, signed(draw_gate() | 1 << 63), -1])
        arguments = {"top_k": top_k, "renormalize": renormalize, "bias_E": bias_E, "unit_E": unit_E}
        assert route(logits_TE, gate_T, **arguments).same_bits(specified(logits_TE, gate_T, **arguments))


@pytest.mark.parametrize("experts", SIZES)
def test_a_hole_equals_removal_whatever_the_excluded_experts_hold(route: Any, experts: int) -> None:
    torch.manual_seed(experts)
    for renormalize in (False, True):
        arguments = {"top_k": 8, "renormalize": renormalize, "fill": "none"}
        for gate in (CLOSED_GATE, draw_gate(), draw_gate() | 1 << 63):
            assert_exclusion_equals_removal(route, torch.randn(experts) * 3, draw_map(experts), gate, **arguments)


@settings(max_examples=25)
@given(
    experts=st.lists(st.tuples(st.floats(-200, 200, width=32), st.integers(0, 63)), min_size=1, max_size=16),
    gate=st.integers(0, 2**64 - 1),
    top_k=st.integers(1, 10),
    renormalize=st.booleans(),
)
@pytest.mark.parametrize("name", ["native", "numpy", "kernel"])
def test_a_hole_equals_removal_for_any_map(
    routers: Any, name: str, experts: list[tuple[float, int]], gate: int, top_k: int, renormalize: bool
) -> None:
    logits, units = zip(*experts, strict=True)
    gate |= 1 << units[0]
    arguments = {"top_k": top_k, "renormalize": renormalize, "fill": "none"}
    assert_exclusion_equals_removal(routers[name], torch.tensor(logits), unit_map(units), gate, **arguments)


@pytest.mark.parametrize("experts", SIZES)
def test_the_order_of_experts_changes_no_weight(route: Any, experts: int) -> None:
    """What a left fold over experts would: the sum has no order."""
    torch.manual_seed(experts)
    logits_TE, unit_E, order_E = torch.randn(7, experts), draw_map(experts), torch.randperm(experts)
    gate_T = torch.full((7,), -1)
    plain = route(logits_TE, gate_T, unit_E=unit_E, top_k=8)
    moved = route(logits_TE[:, order_E], gate_T, unit_E=unit_E[order_E], top_k=8)
    assert torch.equal(plain.weights_TK, moved.weights_TK)
    assert torch.equal(plain.ids_TK, order_E[moved.ids_TK.long()].int())
    assert torch.equal(plain.mass_TU, moved.mass_TU)


def test_several_picks_of_one_unit_set_its_bit_and_add_up_in_its_column(route: Any) -> None:
    """A sum of bits would carry into the next owner's."""
    logits_TE = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0, -2.0]])
    unit_E = unit_map([5, 5, 7, 5, 5, 6])
    routed = route(logits_TE, torch.tensor([1 << 5 | 1 << 7]), unit_E=unit_E, top_k=5)
    assert routed.ids_TK.tolist() == [[0, 1, 2, 3, 4]]
    assert int(routed.chosen_T) == 1 << 5 | 1 << 7
    mass_K = [round(weight * MASS_SCALE) for weight in routed.weights_TK[0].double().tolist()]
    expected = {5: sum(mass_K) - mass_K[2], 7: mass_K[2]}
    assert {unit: mass for unit, mass in enumerate(routed.mass_TU[0].tolist()) if mass} == expected


def test_all_picks_of_unit_63_set_the_sign_bit_alone(route: Any) -> None:
    routed = route(torch.zeros(2, 8), torch.tensor([-(2**63), -1]), unit_E=unit_map([63] * 8), top_k=8)
    assert routed.chosen_T.tolist() == [-(2**63)] * 2
    assert routed.mass_TU[:, 63].tolist() == [MASS_SCALE] * 2
    assert int(routed.mass_TU[:, :63].sum()) == 0


def test_layers_with_maps_of_their_own_add_up_per_unit(route: Any) -> None:
    torch.manual_seed(0)
    layers, maps = [torch.randn(7, 16) for _ in range(3)], [draw_map(16) for _ in range(3)]
    gate_T = torch.full((7,), signed(draw_gate() | 1 << 63))
    together = route.layers(layers, gate_T, top_k=4, maps=maps)
    turned = route.layers(layers[::-1], gate_T, top_k=4, maps=maps[::-1])
    alone = [route(layer, gate_T, unit_E=unit_E, top_k=4) for layer, unit_E in zip(layers, maps, strict=True)]
    assert torch.equal(together.mass_TU, sum(routed.mass_TU for routed in alone))
    assert torch.equal(together.mass_TU, turned.mass_TU)
    assert torch.equal(together.chosen_T, alone[0].chosen_T | alone[1].chosen_T | alone[2].chosen_T)


def test_the_units_bit_admits_an_expert_and_not_its_own(route: Any) -> None:
    routed = route(torch.tensor([[0.0, 9.0, 5.0]]), torch.tensor([0b010]), unit_E=unit_map([1, 2, 1]), top_k=3)
    assert routed.ids_TK.tolist() == [[2, 0, 2]]


@pytest.mark.parametrize("beyond", [7, 8, 63, 64, 65, 128, 255])
def test_a_unit_without_a_column_is_in_no_gate(route: Any, beyond: int) -> None:
    """A shift by 64 would be undefined, one that wraps would open another owner's bit."""
    unit_E = torch.tensor([0, beyond, 1, beyond], dtype=torch.uint8)
    logits_TE = torch.tensor([[0.0, float("nan"), 1.0, 9.0]]).expand(3, 4)
    routed = route(logits_TE, torch.tensor([-1, 0b11, 1]), unit_E=unit_E, units=7, top_k=3)
    assert routed.ids_TK.tolist() == [[2, 0, 2], [2, 0, 2], [0, 0, 0]]
    assert routed.chosen_T.tolist() == [0b11, 0b11, 0b1]
    assert bool(routed.weights_TK.isfinite().all())


def test_the_closed_gate_admits_the_common_experts_alone(route: Any) -> None:
    torch.manual_seed(1)
    unit_E = unit_map([3, 0, 1, 0, 63, 0])
    routed = route(torch.randn(7, 6), torch.full((7,), CLOSED_GATE), unit_E=unit_E, top_k=3)
    assert sorted(set(routed.ids_TK.flatten().tolist())) == [1, 3, 5]
    assert routed.chosen_T.tolist() == [1 << COMMON_UNIT] * 7
    assert CLOSED_GATE == 1


@pytest.mark.parametrize(("fill", "expected"), [("none", -1), ("first", 0), (1, 1)])
def test_a_layer_without_a_candidate_gives_no_weight_and_counts_nothing(route: Any, fill: Any, expected: int) -> None:
    """Refused before it gets here; padding has the closed gate, and a layer need not have a common expert."""
    logits_TE = torch.tensor([[float("nan"), float("inf")], [1.0, 2.0]])
    routed = route(logits_TE, torch.tensor([CLOSED_GATE, 0b1000]), unit_E=unit_map([3, 4]), top_k=2, fill=fill)
    assert routed.ids_TK[0].tolist() == [expected] * 2
    assert routed.weights_TK[0].tolist() == [0.0] * 2
    assert int(routed.mass_TU[0].sum()) == int(routed.chosen_T[0]) == 0
    assert routed.weights_TK[1].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("corrupt", [float("nan"), float("inf")])
@pytest.mark.parametrize("experts", [8, 128])
def test_a_corrupt_allowed_expert_spoils_its_token_alone(route: Any, experts: int, corrupt: float) -> None:
    torch.manual_seed(experts)
    logits_TE, unit_E = torch.randn(3, experts), draw_map(experts)
    clean = route(logits_TE, torch.full((3,), -1), unit_E=unit_E, top_k=3)
    logits_TE[1, experts - 1] = corrupt
    routed = route(logits_TE, torch.full((3,), -1), unit_E=unit_E, top_k=3)
    assert bool(routed.weights_TK[1].isnan().all())
    assert int(routed.mass_TU[1].sum()) == 0
    assert torch.equal(routed.weights_TK[::2], clean.weights_TK[::2])


def test_equal_probabilities_go_to_the_lowest_experts_at_any_size(route: Any) -> None:
    routed = route(torch.zeros(1, 128), torch.tensor([-1]), unit_E=unit_map([3] * 128), top_k=8)
    assert routed.ids_TK.tolist() == [list(range(8))]
    assert routed.weights_TK.tolist() == [[1 / 128] * 8]


def folded(logits_TE: Tensor) -> Tensor:
    """Probabilities by a left fold in fp32 around torch's exponential: what routing was before it had units."""
    exp_TE = (logits_TE - logits_TE.amax(dim=1, keepdim=True)).exp()
    sum_T = torch.zeros(len(logits_TE))
    for exp_T in exp_TE.unbind(dim=1):
        sum_T = sum_T + exp_T
    return exp_TE / sum_T[:, None]


@pytest.mark.parametrize(("experts", "moved"), [(8, 3.4e-7), (64, 7.5e-7), (128, 1.2e-6), (512, 2e-6)])
def test_weights_are_within_three_roundings_of_exact_ones_and_closer_than_a_left_folds(
    routers: Any, experts: int, moved: float
) -> None:
    torch.manual_seed(0)
    for scale in (1, 3):
        logits_TE = torch.randn(4000, experts) * scale
        routed = routers["native"](logits_TE, torch.full((4000,), -1), unit_E=unit_map([1] * experts), top_k=8)
        ids_TK, weights_TK = routed.ids_TK.long(), routed.weights_TK.double()
        exact_TE = (logits_TE - logits_TE.amax(dim=1, keepdim=True)).double().softmax(dim=1)
        torch.testing.assert_close(weights_TK, exact_TE.gather(1, ids_TK), rtol=3 * 2**-24, atol=0)
        fold_TK, fold_ids_TK = folded(logits_TE).sort(dim=1, descending=True, stable=True)
        assert torch.equal(ids_TK, fold_ids_TK[:, :8])
        fold_TK = fold_TK[:, :8].double()
        torch.testing.assert_close(weights_TK, fold_TK, rtol=moved, atol=0)
        exact_TK = exact_TE.gather(1, ids_TK)
        assert (fold_TK / exact_TK - 1).abs().max() > (weights_TK / exact_TK - 1).abs().max()


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([], "a layer has 1..512 experts, got a map of 0"),
        ([0] * 513, "a layer has 1..512 experts, got a map of 513"),
        ([0, 64], "expert 1 is mapped to unit 64; units are 0..63"),
        ([3, 0, -1], "expert 2 is mapped to unit -1; units are 0..63"),
    ],
)
def test_a_map_that_no_gate_can_name_is_refused(units: list[int], message: str) -> None:
    with pytest.raises(KernelArgumentError) as raised:
        unit_map(units)
    assert str(raised.value) == message
