"""`gated_topk` as one Triton kernel: one program per block of tokens, every slot of a token in registers.

Formula, shapes and dtypes: `gated_topk_reference`. What is equal to it bit for bit and what is not: everything but the
exponential. `tl.exp` is the hardware's on a GPU and NumPy's in the interpreter, and may differ from torch's in the last
bit; it depends on its argument alone, never on its place, which is all that exclusion = removal needs. Division is
`div_rn`, because `/` compiles to an approximate one on NVIDIA hardware.

Shape suffixes: B tokens of one program, S slots padded to a power of two, T tokens, E expert slots, K chosen experts.
"""

# A kernel's parameters are pointers and compile-time constants of another language; annotations would say nothing.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from flexgate.kernels.gated_topk.contract import FILL_FIRST, MASS_SCALE, empty_results

_MASS_SCALE: tl.constexpr = tl.constexpr(float(MASS_SCALE))
_FILL_FIRST: tl.constexpr = tl.constexpr(FILL_FIRST)
# Above 2**23 an fp32 value has no fraction bits; adding and subtracting it rounds half to even in hardware.
_NO_FRACTION: tl.constexpr = tl.constexpr(8388608.0)


@triton.jit
def gated_topk_kernel(
    logits_ptr,  # fp32 [T, E], row stride E
    gate_ptr,  # int64 [T]
    bias_ptr,  # fp32 [E]; not read without HAS_BIAS
    mass_ptr,  # int64 [>=T, E]
    chosen_ptr,  # int64 [>=T]
    weights_ptr,  # fp32 [T, K]
    ids_ptr,  # int32 [T, K]
    tokens,
    SLOTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    FILL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    token_B = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    slot_S = tl.arange(0, BLOCK_E)
    live_B = token_B < tokens
    inside_BS = live_B[:, None] & (slot_S < SLOTS)[None, :]
    cell_BS = token_B[:, None] * SLOTS + slot_S[None, :]

    gate_B = tl.load(gate_ptr + token_B, mask=live_B, other=0)
    allowed_BS = inside_BS & (((gate_B[:, None] >> slot_S[None, :].to(tl.int64)) & 1) != 0)
    logits_BS = tl.load(logits_ptr + cell_BS, mask=inside_BS, other=0.0)
    if HAS_BIAS:
        logits_BS += tl.load(bias_ptr + slot_S, mask=slot_S < SLOTS, other=0.0)[None, :]
    # Selected, never multiplied or added: what an excluded slot holds may be NaN.
    logits_BS = tl.where(allowed_BS, logits_BS, float("-inf"))
    exp_BS = tl.exp(logits_BS - tl.max(logits_BS, axis=1)[:, None])

    # One slot after another: a tree reduction would round differently with a slot removed than with it masked.
    # Picking one column out by a sum over zeros is exact in any order.
    sum_B = tl.zeros([BLOCK_T], tl.float32)
    for slot in tl.static_range(SLOTS):
        sum_B += tl.sum(tl.where(allowed_BS & (slot_S == slot)[None, :], exp_BS, 0.0), axis=1)
    prob_BS = tl.math.div_rn(exp_BS, tl.broadcast_to(sum_B[:, None], [BLOCK_T, BLOCK_E]))

    # Keys: probability (NaN as 0) where allowed, −1 where not, −2 once picked.
    key_BS = tl.where(prob_BS == prob_BS, prob_BS, 0.0)
    key_BS = tl.where(allowed_BS, key_BS, -1.0)
    rank_BS = tl.full([BLOCK_T, BLOCK_E], TOP_K, tl.int32)
    total_B = tl.zeros([BLOCK_T], tl.float32)
    first_B = tl.zeros([BLOCK_T], tl.int32)
    for rank in tl.static_range(TOP_K):
        key_B = tl.max(key_BS, axis=1)
        id_B = tl.min(tl.where(key_BS == key_B[:, None], slot_S[None, :], BLOCK_E), axis=1)
        picked_BS = (slot_S[None, :] == id_B[:, None]) & (key_B >= 0.0)[:, None]
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
    for rank in tl.static_range(TOP_K):
        weight_B = tl.sum(tl.where(rank_BS == rank, weight_BS, 0.0), axis=1)
        tl.store(weights_ptr + token_B * TOP_K + rank, weight_B, mask=live_B)

    real_BS = inside_BS & (rank_BS < TOP_K)
    mass_BS = tl.where(real_BS & (weight_BS == weight_BS), weight_BS, 0.0) * _MASS_SCALE
    mass_BS = tl.where(mass_BS < _NO_FRACTION, (mass_BS + _NO_FRACTION) - _NO_FRACTION, mass_BS).to(tl.int64)
    mass_BS += tl.load(mass_ptr + cell_BS, mask=real_BS, other=0)
    tl.store(mass_ptr + cell_BS, mass_BS, mask=real_BS)
    # Distinct bits: their sum is their union.
    one_S = tl.full([BLOCK_E], 1, tl.int64)
    bits_B = tl.sum(tl.where(real_BS, (one_S << slot_S.to(tl.int64))[None, :], 0), axis=1)
    chosen_B = tl.load(chosen_ptr + token_B, mask=live_B, other=0)
    tl.store(chosen_ptr + token_B, chosen_B | bits_B, mask=live_B)


def launch_gated_topk(
    kernel: Any,
    router_logits_TE: Tensor,
    gate_T: Tensor,
    bias_E: Tensor | None,
    mass_TE: Tensor,
    chosen_T: Tensor,
    top_k: int,
    renormalize: bool,
    fill: int,
) -> tuple[Tensor, Tensor]:
    """Launch `kernel` (the compiled one, or its interpreted twin) over all tokens."""
    tokens, slots = router_logits_TE.shape
    logits_TE, gate_T = router_logits_TE.contiguous(), gate_T.contiguous()
    weights_TK, ids_TK = empty_results(logits_TE, top_k)
    if tokens == 0:
        return weights_TK, ids_TK
    block_E = triton.next_power_of_2(slots)
    block_T = max(1, min(triton.next_power_of_2(tokens), 256 // block_E))
    kernel[(triton.cdiv(tokens, block_T),)](
        logits_TE,
        gate_T,
        logits_TE if bias_E is None else bias_E.contiguous(),
        mass_TE,
        chosen_T,
        weights_TK,
        ids_TK,
        tokens,
        SLOTS=slots,
        TOP_K=top_k,
        RENORMALIZE=renormalize,
        FILL=fill,
        HAS_BIAS=bias_E is not None,
        BLOCK_T=block_T,
        BLOCK_E=block_E,
        num_warps=1,
        enable_fp_fusion=False,
    )
    return weights_TK, ids_TK


def gated_topk_cuda(
    router_logits_TE: Tensor,
    gate_T: Tensor,
    bias_E: Tensor | None,
    mass_TE: Tensor,
    chosen_T: Tensor,
    top_k: int,
    renormalize: bool,
    fill: int,
) -> tuple[Tensor, Tensor]:
    """The operator's CUDA implementation: one launch, no synchronisation, safe inside a CUDA graph."""
    return launch_gated_topk(
        gated_topk_kernel, router_logits_TE, gate_T, bias_E, mass_TE, chosen_T, top_k, renormalize, fill
    )
