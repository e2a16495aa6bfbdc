"""`gated_topk` as one Triton kernel: one program per block of tokens, every expert of a token in registers.

Formula, shapes and dtypes: `gated_topk_reference`, met bit for bit in the interpreter. Division is `div_rn`, because
`/` compiles to an approximate one on NVIDIA hardware; the exponential is float64 arithmetic, which has no such form.

Shape suffixes: B tokens of one program, S experts padded to a power of two, T tokens, E experts of the layer, U units,
V units padded to a power of two, K chosen experts.
"""

# A kernel's parameters are pointers and compile-time constants of another language; annotations would say nothing.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from flexgate.kernels.gated_topk import exponential
from flexgate.kernels.gated_topk.contract import FILL_FIRST, MASS_SCALE, MAX_UNITS, empty_results

_SCALE: tl.constexpr = tl.constexpr(float(MASS_SCALE))
_FILL_FIRST: tl.constexpr = tl.constexpr(FILL_FIRST)
_LAST_BIT: tl.constexpr = tl.constexpr(MAX_UNITS - 1)
# Above 2**23 an fp32 value has no fraction bits; adding and subtracting it rounds half to even in hardware.
_NO_FRACTION: tl.constexpr = tl.constexpr(8388608.0)
# The same for float64, with the integer left in the low bits.
_ROUND: tl.constexpr = tl.constexpr(6755399441055744.0)
_LOG2_E: tl.constexpr = tl.constexpr(exponential.LOG2_E)
_LN2_HIGH: tl.constexpr = tl.constexpr(exponential.LN2_HIGH)
_LN2_LOW: tl.constexpr = tl.constexpr(exponential.LN2_LOW)
_COEFFICIENTS: tl.constexpr = tl.constexpr(exponential.COEFFICIENTS)
_TERMS: tl.constexpr = tl.constexpr(len(exponential.COEFFICIENTS))
_LEAST: tl.constexpr = tl.constexpr(exponential.LEAST)
_EXPONENT_BIAS: tl.constexpr = tl.constexpr(exponential.EXPONENT_BIAS)
_MANTISSA_BITS: tl.constexpr = tl.constexpr(exponential.MANTISSA_BITS)


@triton.jit
def _exponential(shifted):
    """exp of fp32 arguments that are not positive, see exponential.py; selections keep a NaN."""
    d = tl.where(shifted < _LEAST, _LEAST, shifted).to(tl.float64)
    rounded = d * _LOG2_E + _ROUND
    n = rounded - _ROUND
    r = (d - n * _LN2_HIGH) - n * _LN2_LOW
    polynomial = r * 0.0 + _COEFFICIENTS[0]
    for power in tl.static_range(1, _TERMS):
        polynomial = polynomial * r + _COEFFICIENTS[power]
    exponent = (rounded.to(tl.int64, bitcast=True) + _EXPONENT_BIAS) << _MANTISSA_BITS
    return (polynomial * exponent.to(tl.float64, bitcast=True)).to(tl.float32)


@triton.jit
def _fixed(value):
    """round_half_even(value · 2³²) of fp32 values in 0..1 as int64."""
    scaled = value * _SCALE
    return tl.where(scaled < _NO_FRACTION, (scaled + _NO_FRACTION) - _NO_FRACTION, scaled).to(tl.int64)


@triton.jit
def gated_topk_kernel(
    logits_ptr,  # fp32 [T, E], row stride E
    gate_ptr,  # int64 [T]
    unit_ptr,  # uint8 [E]
    bias_ptr,  # fp32 [E]; not read without HAS_BIAS
    mass_ptr,  # int64 [>=T, U]
    chosen_ptr,  # int64 [>=T]
    weights_ptr,  # fp32 [T, K]
    ids_ptr,  # int32 [T, K]
    tokens,
    EXPERTS: tl.constexpr,
    UNITS: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    FILL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    token_B = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert_S = tl.arange(0, BLOCK_E)
    live_B = token_B < tokens
    inside_BS = live_B[:, None] & (expert_S < EXPERTS)[None, :]

    gate_B = tl.load(gate_ptr + token_B, mask=live_B, other=0)
    unit_S = tl.load(unit_ptr + expert_S, mask=expert_S < EXPERTS, other=0).to(tl.int32)
    # A shift by 64 or more is undefined: such a unit is shifted by less and not allowed.
    shift_S = (unit_S & _LAST_BIT).to(tl.int64)
    allowed_BS = inside_BS & (unit_S < UNITS)[None, :] & (((gate_B[:, None] >> shift_S[None, :]) & 1) != 0)
    logits_BS = tl.load(logits_ptr + token_B[:, None] * EXPERTS + expert_S[None, :], mask=inside_BS, other=0.0)
    if HAS_BIAS:
        logits_BS += tl.load(bias_ptr + expert_S, mask=expert_S < EXPERTS, other=0.0)[None, :]
    # Selected, never multiplied or added: what an excluded expert holds may be NaN.
    logits_BS = tl.where(allowed_BS, logits_BS, float("-inf"))
    exp_BS = _exponential(logits_BS - tl.max(logits_BS, axis=1)[:, None])

    # In fixed point, so that the reduction may add in any order.
    number_BS = allowed_BS & (exp_BS == exp_BS)
    sum_B = tl.sum(_fixed(tl.where(number_BS, exp_BS, 0.0)), axis=1).to(tl.float32) / _SCALE
    corrupt_B = tl.max((allowed_BS & (exp_BS != exp_BS)).to(tl.int32), axis=1) != 0
    sum_B = tl.where(corrupt_B, float("nan"), sum_B)
    prob_BS = tl.math.div_rn(exp_BS, tl.broadcast_to(sum_B[:, None], [BLOCK_T, BLOCK_E]))

    # Keys: probability (NaN as 0) where allowed, −1 where not, −2 once picked.
    key_BS = tl.where(prob_BS == prob_BS, prob_BS, 0.0)
    key_BS = tl.where(allowed_BS, key_BS, -1.0)
    rank_BS = tl.full([BLOCK_T, BLOCK_E], TOP_K, tl.int32)
    total_B = tl.zeros([BLOCK_T], tl.float32)
    first_B = tl.zeros([BLOCK_T], tl.int32)
    for rank in tl.static_range(TOP_K):
        key_B = tl.max(key_BS, axis=1)
        id_B = tl.min(tl.where(key_BS == key_B[:, None], expert_S[None, :], BLOCK_E), axis=1)
        picked_BS = (expert_S[None, :] == id_B[:, None]) & (key_B >= 0.0)[:, None]
        rank_BS = tl.where(picked_BS, rank, rank_BS)
        total_B += tl.sum(tl.where(picked_BS, prob_BS, 0.0), axis=1)
        if rank == 0:
            first_B = id_B
        id_B = tl.where(key_B >= 0.0, id_B, first_B) if FILL == _FILL_FIRST else tl.where(key_B >= 0.0, id_B, FILL)
        tl.store(ids_ptr + token_B * TOP_K + rank, id_B, mask=live_B)
        key_BS = tl.where(picked_BS, -2.0, key_BS)

    weight_BS = prob_BS
    if RENORMALIZE:
        weight_BS = tl.math.div_rn(prob_BS, tl.broadcast_to(total_B[:, None], [BLOCK_T, BLOCK_E]))
    # Rank by rank, so that several picks of one unit add up in its column and set its one bit.
    unit_V = tl.arange(0, BLOCK_U)
    mass_BV = tl.zeros([BLOCK_T, BLOCK_U], tl.int64)
    taken_BV = tl.zeros([BLOCK_T, BLOCK_U], tl.int32)
    bits_B = tl.zeros([BLOCK_T], tl.int64)
    for rank in tl.static_range(TOP_K):
        ranked_BS = inside_BS & (rank_BS == rank)
        weight_B = tl.sum(tl.where(ranked_BS, weight_BS, 0.0), axis=1)
        tl.store(weights_ptr + token_B * TOP_K + rank, weight_B, mask=live_B)
        # −1 where the rank is unused.
        unit_B = tl.max(tl.where(ranked_BS, unit_S[None, :], -1), axis=1)
        mass_B = _fixed(tl.where(weight_B == weight_B, weight_B, 0.0))
        mass_BV += tl.where(unit_V[None, :] == unit_B[:, None], mass_B[:, None], 0)
        taken_BV |= (unit_V[None, :] == unit_B[:, None]).to(tl.int32)
        one_B = tl.where(unit_B >= 0, tl.full([BLOCK_T], 1, tl.int64), 0)
        bits_B |= one_B << (unit_B & _LAST_BIT).to(tl.int64)

    cell_BV = token_B[:, None] * UNITS + unit_V[None, :]
    real_BV = live_B[:, None] & (taken_BV != 0)
    mass_BV += tl.load(mass_ptr + cell_BV, mask=real_BV, other=0)
    tl.store(mass_ptr + cell_BV, mass_BV, mask=real_BV)
    chosen_B = tl.load(chosen_ptr + token_B, mask=live_B, other=0)
    tl.store(chosen_ptr + token_B, chosen_B | bits_B, mask=live_B)


def launch_gated_topk(
    kernel: Any,
    router_logits_TE: Tensor,
    gate_T: Tensor,
    unit_E: Tensor,
    bias_E: Tensor | None,
    mass_TU: Tensor,
    chosen_T: Tensor,
    top_k: int,
    renormalize: bool,
    fill: int,
) -> tuple[Tensor, Tensor]:
    """Launch `kernel` (the compiled one, or its interpreted twin) over all tokens."""
    tokens, experts = router_logits_TE.shape
    logits_TE, gate_T = router_logits_TE.contiguous(), gate_T.contiguous()
    weights_TK, ids_TK = empty_results(logits_TE, top_k)
    if tokens == 0:
        return weights_TK, ids_TK
    block_E = triton.next_power_of_2(experts)
    block_T = max(1, min(triton.next_power_of_2(tokens), 256 // block_E))
    kernel[(triton.cdiv(tokens, block_T),)](
        logits_TE,
        gate_T,
        unit_E.contiguous(),
        logits_TE if bias_E is None else bias_E.contiguous(),
        mass_TU,
        chosen_T,
        weights_TK,
        ids_TK,
        tokens,
        EXPERTS=experts,
        UNITS=mass_TU.shape[1],
        TOP_K=top_k,
        RENORMALIZE=renormalize,
        FILL=fill,
        HAS_BIAS=bias_E is not None,
        BLOCK_T=block_T,
        BLOCK_E=block_E,
        BLOCK_U=triton.next_power_of_2(mass_TU.shape[1]),
        num_warps=1,
        enable_fp_fusion=False,
    )
    return weights_TK, ids_TK


def gated_topk_cuda(
    router_logits_TE: Tensor,
    gate_T: Tensor,
    unit_E: Tensor,
    bias_E: Tensor | None,
    mass_TU: Tensor,
    chosen_T: Tensor,
    top_k: int,
    renormalize: bool,
    fill: int,
) -> tuple[Tensor, Tensor]:
    """The operator's CUDA implementation: one launch, no synchronisation, safe inside a CUDA graph."""
    return launch_gated_topk(
        gated_topk_kernel, router_logits_TE, gate_T, unit_E, bias_E, mass_TU, chosen_T, top_k, renormalize, fill
    )
