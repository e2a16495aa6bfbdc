"""The routing plan on the device equals its specification and is a permutation.

Shape suffixes: T tokens, E expert slots, K chosen experts.
"""

from typing import Any

import pytest
import torch

from flexgate.kernels.gated_experts import routing_plan_reference
from flexgate.kernels.gated_experts.launch import Kernels, launch_plan
from flexgate.kernels.gated_experts.plan import max_tiles


@pytest.mark.parametrize(
    ("tokens", "slots"),
    [(1, 1), (1, 7), (7, 9), (13, 64), (300, 1), (300, 9), pytest.param(300, 64, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("block_t", [16, 64])
def test_plan_equals_its_specification(kernels: Kernels, layer: Any, tokens: int, slots: int, block_t: int) -> None:
    routed = layer(tokens, slots, hidden=1, intermediate=1, top_k=5)
    ours = launch_plan(kernels, routed.weights_TK, routed.ids_TK, slots, block_t)
    specified = routing_plan_reference(routed.weights_TK, routed.ids_TK, slots=slots, block_t=block_t)
    assert torch.equal(ours.offsets_E1, specified.offsets_E1)
    assert torch.equal(ours.position_P, specified.position_P)
    assert torch.equal(ours.tiles_1, specified.tiles_1)
    rows, tiles = int(specified.offsets_E1[-1]), int(specified.tiles_1)
    assert torch.equal(ours.order_P[:rows], specified.order_P[:rows])
    assert torch.equal(ours.tile_slot_M[:tiles], specified.tile_slot_M[:tiles])
    assert torch.equal(ours.tile_row_M[:tiles], specified.tile_row_M[:tiles])
    for beyond in (ours.order_P[rows:], ours.tile_slot_M[tiles:], ours.tile_row_M[tiles:]):
        assert bool((beyond == -7_777_777).all())

    real_P = routed.ids_TK.reshape(-1) >= 0
    assert rows == int(real_P.sum())
    assert torch.equal(ours.position_P[ours.order_P[:rows].long()], torch.arange(rows, dtype=torch.int32))
    assert torch.equal(ours.position_P >= 0, real_P)


def test_fillers_are_in_no_experts_rows_whatever_id_they_carry(kernels: Kernels) -> None:
    ids_TK = torch.tensor([[4, 4, 4], [-1, -1, -1], [2, 9, 0], [0, 4, 2]], dtype=torch.int32)
    weights_TK = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.6, 0.3, 0.1], [float("nan"), 0.0, -0.0]])
    plan = launch_plan(kernels, weights_TK, ids_TK, 9, 16)
    assert plan.offsets_E1.tolist() == [0, 2, 2, 3, 3, 4, 4, 4, 4, 4]
    assert plan.order_P[:4].tolist() == [8, 9, 6, 0]
    assert plan.position_P.tolist() == [3, -1, -1, -1, -1, -1, 2, -1, 0, 1, -1, -1]
    assert plan.tile_slot_M[: int(plan.tiles_1)].tolist() == [0, 2, 4]


def test_nothing_chosen_is_an_empty_plan(kernels: Kernels) -> None:
    ids_TK = torch.full((7, 5), -1, dtype=torch.int32)
    plan = launch_plan(kernels, torch.zeros(7, 5), ids_TK, 7, 16)
    assert int(plan.tiles_1) == 0
    assert plan.offsets_E1.tolist() == [0] * 8
    assert bool((plan.position_P == -1).all())


def test_one_expert_for_everyone_is_cut_into_full_tiles(kernels: Kernels) -> None:
    ids_TK = torch.full((300, 1), 6, dtype=torch.int32)
    plan = launch_plan(kernels, torch.ones(300, 1), ids_TK, 7, 16)
    assert int(plan.tiles_1) == 19
    assert plan.tile_row_M[:19].tolist() == list(range(0, 300, 16))
    assert plan.tile_slot_M[:19].tolist() == [6] * 19


def test_the_tile_buffer_holds_the_worst_case() -> None:
    for tokens in (1, 2, 15, 16, 17, 31, 100):
        for slots in (1, 3, 64):
            ids_TK = (torch.arange(tokens) % slots).int()[:, None]
            plan = routing_plan_reference(torch.ones(tokens, 1), ids_TK, slots=slots, block_t=16)
            assert int(plan.tiles_1) <= max_tiles(tokens, slots, 16)
