"""The Triton kernels of `gated_experts`: plan, gate/up with SwiGLU, down, combine. Formulas: `gated_experts_reference`.

What every kernel here keeps, whatever the tile sizes: the reduction runs in ascending order into one fp32 accumulator
and is never split; no fused multiply-add outside the matrix instruction (compiled with enable_fp_fusion=False); no
atomics; nothing is read back by the host. A row's result therefore depends on that row and its expert alone, given
that the matrix instruction itself treats every output element alike (which a device has to be asked, not a compiler).

Both products are taken transposed, Dᵀ[F, T] = W[F, H] · Xᵀ[H, T]: the expert's rows fill the instruction's 64-row side
and the few tokens of a decode step its narrow one. Grids are persistent: a fixed number of programs walks a tile list
whose length is on the device.

Shape suffixes: T, B tokens (all, of one tile), K chosen experts, P picks, E expert slots, S slots padded to a power of
two, H hidden, F expert intermediate, G = 2F; N output rows of one tile, D reduction columns of one step.
"""

# A kernel's parameters are pointers and compile-time constants of another language; annotations would say nothing.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _real_ids(ids_ptr, weights_ptr, pick_P, picks, SLOTS: tl.constexpr):
    """The slot of each real pick, −1 for fillers and beyond the last pick."""
    id_P = tl.load(ids_ptr + pick_P, mask=pick_P < picks, other=-1)
    weight_P = tl.load(weights_ptr + pick_P, mask=pick_P < picks, other=0.0)
    return tl.where((id_P < SLOTS) & (weight_P != 0.0), id_P, -1)


@triton.jit
def plan_kernel(
    ids_ptr,  # int32 [P]
    weights_ptr,  # fp32 [P]
    order_ptr,  # int32 [P]
    position_ptr,  # int32 [P]
    offsets_ptr,  # int32 [E + 1]
    tile_slot_ptr,  # int32 [M]
    tile_row_ptr,  # int32 [M]
    tiles_ptr,  # int32 [1]
    picks,
    SLOTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program per slot. Each counts all slots, and so knows its own offset without talking to the others."""
    own = tl.program_id(0)
    slot_S = tl.arange(0, BLOCK_E)
    count_S = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, picks, BLOCK_P):
        pick_P = start + tl.arange(0, BLOCK_P)
        id_P = _real_ids(ids_ptr, weights_ptr, pick_P, picks, SLOTS)
        count_S += tl.sum((id_P[:, None] == slot_S[None, :]).to(tl.int32), axis=0)
        if own == 0:
            tl.store(position_ptr + pick_P, tl.full([BLOCK_P], -1, tl.int32), mask=(pick_P < picks) & (id_P < 0))

    tiles_S = (count_S + BLOCK_T - 1) // BLOCK_T
    row = tl.sum(tl.where(slot_S < own, count_S, 0), axis=0)
    tile = tl.sum(tl.where(slot_S < own, tiles_S, 0), axis=0)
    own_tiles = tl.sum(tl.where(slot_S == own, tiles_S, 0), axis=0)
    tl.store(offsets_ptr + own, row)
    if own == SLOTS - 1:
        tl.store(offsets_ptr + SLOTS, tl.sum(count_S, axis=0))
        tl.store(tiles_ptr, tl.sum(tiles_S, axis=0))
    for start in range(0, own_tiles, BLOCK_P):
        step_P = start + tl.arange(0, BLOCK_P)
        tl.store(tile_slot_ptr + tile + step_P, tl.zeros([BLOCK_P], tl.int32) + own, mask=step_P < own_tiles)
        tl.store(tile_row_ptr + tile + step_P, row + step_P * BLOCK_T, mask=step_P < own_tiles)

    for start in range(0, picks, BLOCK_P):
        pick_P = start + tl.arange(0, BLOCK_P)
        mine_P = _real_ids(ids_ptr, weights_ptr, pick_P, picks, SLOTS) == own
        row_P = row + tl.cumsum(mine_P.to(tl.int32), axis=0) - 1
        tl.store(order_ptr + row_P, pick_P, mask=mine_P)
        tl.store(position_ptr + pick_P, row_P, mask=mine_P)
        row += tl.sum(mine_P.to(tl.int32), axis=0)


@triton.jit
def _tile_of(index, tiles, columns, GROUP: tl.constexpr):
    """(row tile, column tile) of the index-th tile: GROUP row tiles share each weight tile while it is in L2."""
    first = (index // (GROUP * columns)) * GROUP
    height = tl.minimum(tiles - first, GROUP)
    within = index % (GROUP * columns)
    return first + within % height, within // height


@triton.jit
def _weight_tile(
    source, plane, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """source[plane, row : row + BLOCK_N, column : column + BLOCK_D] of a [planes, ROWS, COLUMNS] array, 0 outside."""
    if USE_TMA:
        tile_ND = source.load([plane, row, column]).reshape(BLOCK_N, BLOCK_D)
    else:
        row_N = row + tl.arange(0, BLOCK_N)
        column_D = column + tl.arange(0, BLOCK_D)
        inside_ND = (row_N < ROWS)[:, None] & (column_D < COLUMNS)[None, :]
        start = source + plane.to(tl.int64) * (ROWS * COLUMNS)
        place_ND = start + row_N.to(tl.int64)[:, None] * COLUMNS + column_D[None, :]
        tile_ND = tl.load(place_ND, mask=inside_ND, other=0.0)
    return tile_ND


@triton.jit
def gate_up_kernel(
    x_ptr,  # [T, H]
    w13,  # [E·2, F, H]: tensor descriptor with USE_TMA, else a pointer
    hidden_ptr,  # [P, F]
    order_ptr,
    offsets_ptr,
    tile_slot_ptr,
    tile_row_ptr,
    tiles_ptr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """hidden[row, f] = silu(Σ_h gate[f, h] x[t, h]) · Σ_h up[f, h] x[t, h], rounded once; t = order[row] // K."""
    columns: tl.constexpr = (INTERMEDIATE + BLOCK_N - 1) // BLOCK_N
    tiles = tl.load(tiles_ptr)
    for index in tl.range(tl.program_id(0), tiles * columns, PROGRAMS):
        tile, column = _tile_of(index, tiles, columns, GROUP)
        slot = tl.load(tile_slot_ptr + tile)
        row_B = tl.load(tile_row_ptr + tile) + tl.arange(0, BLOCK_T)
        live_B = row_B < tl.load(offsets_ptr + slot + 1)
        token_B = (tl.load(order_ptr + row_B, mask=live_B, other=0) // TOP_K).to(tl.int64)
        first_f = column * BLOCK_N

        gate_NB = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        up_NB = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for h in tl.range(0, HIDDEN, BLOCK_D):
            h_D = h + tl.arange(0, BLOCK_D)
            inside_BD = live_B[:, None] & (h_D < HIDDEN)[None, :]
            x_BD = tl.load(x_ptr + token_B[:, None] * HIDDEN + h_D[None, :], mask=inside_BD, other=0.0)
            gate_ND = _weight_tile(w13, slot * 2, first_f, h, INTERMEDIATE, HIDDEN, BLOCK_N, BLOCK_D, USE_TMA)
            gate_NB = tl.dot(gate_ND, tl.trans(x_BD), gate_NB, input_precision="ieee")
            up_ND = _weight_tile(w13, slot * 2 + 1, first_f, h, INTERMEDIATE, HIDDEN, BLOCK_N, BLOCK_D, USE_TMA)
            up_NB = tl.dot(up_ND, tl.trans(x_BD), up_NB, input_precision="ieee")

        hidden_NB = gate_NB / (1.0 + tl.exp(-gate_NB)) * up_NB
        f_N = first_f + tl.arange(0, BLOCK_N)
        inside_NB = (f_N < INTERMEDIATE)[:, None] & live_B[None, :]
        place_NB = row_B.to(tl.int64)[None, :] * INTERMEDIATE + f_N[:, None]
        tl.store(hidden_ptr + place_NB, hidden_NB.to(hidden_ptr.dtype.element_ty), mask=inside_NB)


@triton.jit
def down_kernel(
    hidden_ptr,  # [P, F]
    w2,  # [E, H, F]: tensor descriptor with USE_TMA, else a pointer
    expert_ptr,  # fp32 [P, H]
    offsets_ptr,
    tile_slot_ptr,
    tile_row_ptr,
    tiles_ptr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """expert[row, h] = Σ_f w2[h, f] hidden[row, f], in fp32: the only rounding after it is the combine's."""
    columns: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    tiles = tl.load(tiles_ptr)
    for index in tl.range(tl.program_id(0), tiles * columns, PROGRAMS):
        tile, column = _tile_of(index, tiles, columns, GROUP)
        slot = tl.load(tile_slot_ptr + tile)
        row_B = tl.load(tile_row_ptr + tile) + tl.arange(0, BLOCK_T)
        live_B = row_B < tl.load(offsets_ptr + slot + 1)
        first_h = column * BLOCK_N

        sum_NB = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for f in tl.range(0, INTERMEDIATE, BLOCK_D):
            f_D = f + tl.arange(0, BLOCK_D)
            place_BD = hidden_ptr + row_B.to(tl.int64)[:, None] * INTERMEDIATE + f_D[None, :]
            inside_BD = live_B[:, None] & (f_D < INTERMEDIATE)[None, :]
            hidden_BD = tl.load(place_BD, mask=inside_BD, other=0.0)
            w2_ND = _weight_tile(w2, slot, first_h, f, HIDDEN, INTERMEDIATE, BLOCK_N, BLOCK_D, USE_TMA)
            sum_NB = tl.dot(w2_ND, tl.trans(hidden_BD), sum_NB, input_precision="ieee")

        h_N = first_h + tl.arange(0, BLOCK_N)
        inside_NB = (h_N < HIDDEN)[:, None] & live_B[None, :]
        tl.store(expert_ptr + row_B.to(tl.int64)[None, :] * HIDDEN + h_N[:, None], sum_NB, mask=inside_NB)


@triton.jit
def combine_kernel(
    expert_ptr,  # fp32 [P, H]
    weights_ptr,  # fp32 [T, K]
    position_ptr,  # int32 [T, K]
    out_ptr,  # [T, H]
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out[t] = Σ weights[t, k] · expert[position[t, k]] over real picks, in ascending slot order, rounded once.

    Sorted rows ascend with the slot, so ascending positions are ascending slots.
    """
    token = tl.program_id(0).to(tl.int64)
    h_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    rank_K = tl.arange(0, BLOCK_K)
    behind: tl.constexpr = 2147483647
    position_K = tl.load(position_ptr + token * TOP_K + rank_K, mask=rank_K < TOP_K, other=-1)
    position_K = tl.where(position_K < 0, behind, position_K)
    weight_K = tl.load(weights_ptr + token * TOP_K + rank_K, mask=rank_K < TOP_K, other=0.0)

    sum_H = tl.zeros([BLOCK_H], tl.float32)
    for _ in tl.static_range(TOP_K):
        position = tl.min(position_K, axis=0)
        real_H = tl.broadcast_to(position, [BLOCK_H]) != behind
        weight = tl.sum(tl.where(position_K == position, weight_K, 0.0), axis=0)
        inside_H = (h_H < HIDDEN) & real_H
        row_H = tl.load(expert_ptr + position.to(tl.int64) * HIDDEN + h_H, mask=inside_H, other=0.0)
        # Selected, not multiplied by 0: an unused pick must add nothing, not even −0 or NaN.
        sum_H = tl.where(real_H, sum_H + weight * row_H, sum_H)
        position_K = tl.where(position_K == position, behind, position_K)
    tl.store(out_ptr + token * HIDDEN + h_H, sum_H.to(out_ptr.dtype.element_ty), mask=h_H < HIDDEN)
