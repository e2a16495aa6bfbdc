"""Which token goes where: the routing plan, and its specification.

A *real pick* is an entry of ids_TK inside 0..E−1 whose weight is not exactly 0. Fillers (id −1, or any id at weight 0)
are in no expert's rows, so an expert that no token really chose is not in the plan and its weights are never read.

Shape suffixes: T tokens, K chosen experts, P = T·K picks in row-major order, E expert slots, M row tiles.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingPlan:
    """Real picks sorted by slot and, within a slot, by token; cut into tiles of one slot each.

    Entries beyond those that the counts name (order from offsets[E] up, tiles from tiles_1 up) are unspecified: the
    buffers have the size of the worst case, because the counts live on the device.
    """

    order_P: Tensor
    """int32: the pick (t·K + k) that stands at each sorted row."""

    position_P: Tensor
    """int32: the sorted row of each pick, −1 for a filler; the inverse of order_P."""

    offsets_E1: Tensor
    """int32 [E + 1]: slot e owns the sorted rows offsets[e] .. offsets[e + 1] − 1."""

    tile_slot_M: Tensor
    """int32: the slot of each tile, ascending."""

    tile_row_M: Tensor
    """int32: the first sorted row of each tile; it ends after block_t rows or with its slot."""

    tiles_1: Tensor
    """int32 [1]: the number of tiles."""


def max_tiles(picks: int, slots: int, block_t: int) -> int:
    """The most tiles that `picks` rows can need: every slot in use leaves at most one tile partly filled."""
    return picks // block_t + min(picks, slots)


def empty_plan(ids_TK: Tensor, slots: int, block_t: int) -> RoutingPlan:
    """Buffers for the plan of `ids_TK`, unwritten."""
    picks = ids_TK.numel()
    tiles = max_tiles(picks, slots, block_t)
    sizes = (picks, picks, slots + 1, tiles, tiles, 1)
    return RoutingPlan(*(ids_TK.new_empty(size, dtype=torch.int32) for size in sizes))


def routing_plan_reference(weights_TK: Tensor, ids_TK: Tensor, *, slots: int, block_t: int) -> RoutingPlan:
    """The specification of the plan; unspecified entries hold −1."""
    plan = empty_plan(ids_TK, slots, block_t)
    for field in (plan.order_P, plan.position_P, plan.tile_slot_M, plan.tile_row_M):
        field.fill_(-1)
    ids_P, weights_P = ids_TK.reshape(-1).tolist(), weights_TK.reshape(-1).tolist()
    row, tile = 0, 0
    for slot in range(slots):
        plan.offsets_E1[slot] = first_row = row
        for pick, (chosen, weight) in enumerate(zip(ids_P, weights_P, strict=True)):
            if chosen == slot and weight != 0:
                plan.order_P[row], plan.position_P[pick] = pick, row
                row += 1
        for start in range(first_row, row, block_t):
            plan.tile_slot_M[tile], plan.tile_row_M[tile] = slot, start
            tile += 1
    plan.offsets_E1[slots], plan.tiles_1[0] = row, tile
    return plan
