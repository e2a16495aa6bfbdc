"""The specification of `gated_experts`, in torch, computing in fp32.

Shape suffixes: T tokens, E slots of full experts, K chosen experts, H hidden, F expert intermediate, G = 2F gate rows
then up rows, W width of a narrow expert, R rank; I and O input and output of a projection.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, silu

from flexgate.kernels.gated_experts.contract import NarrowExperts, Smaller, check_arguments

RANKS_AT_ONCE = 16
"""A low-rank product is made in blocks of as many ranks, so that zeros a slot pads with change no shape and no bit."""

Projection = Callable[[Tensor], Tensor]
"""A row [1, I] in fp32 → [1, O] in fp32."""


def gated_experts_reference(
    x_TH: Tensor, w13_EGH: Tensor, w2_EHF: Tensor, weights_TK: Tensor, ids_TK: Tensor, smaller: Smaller = ()
) -> Tensor:
    """The chosen experts' SwiGLU networks, weighted and added up.

    With the real picks of token t (ids of slots that there are, weight not exactly 0) in ascending slot order:

        h(t, e) = round( silu(gate_e(x[t])) ∘ up_e(x[t]) )      rounded once, to the dtype of x
        out[t]  = round( Σ_e weights(t, e) · down_e(h(t, e)) )  fp32, a left fold in slot order from 0

    where gate_e, up_e and down_e multiply with w13[e, :F], w13[e, F:] and w2[e]; for a narrow expert with its own
    matrices likewise; and for a low-rank expert, with factors A and B of each projection,

        gate_e(x) = gate_0(x) + Σ_b B_b · (A_b · x)             products and sums in fp32, nothing rounded between

    b counts blocks of 16 ranks, the last filled up with zeros, added up in ascending order from 0: zeros that a slot
    pads factors with change no bit.

    x_TH, w13_EGH, w2_EHF and all of `smaller`: one floating dtype; weights_TK fp32; ids_TK int32. Returns out_TH in the
    dtype of x. A token without a real pick gets zeros. A slot that no real pick names is not read, except slot 0
    where one names a low-rank expert.
    """
    check_arguments(x_TH, w13_EGH, w2_EHF, weights_TK, ids_TK, smaller)
    out_TH = torch.zeros_like(x_TH, dtype=torch.float32)
    for slot, expert in enumerate(_experts(w13_EGH, w2_EHF, smaller)):
        tokens, ranks = ((ids_TK == slot) & (weights_TK != 0)).nonzero(as_tuple=True)
        if len(tokens) == 0:
            continue
        # One row at a time, from copies: a BLAS rounds by the number of rows and by alignment, and a token must not
        # see how many others chose its expert.
        gate_up, down = expert()
        for token, rank in zip(tokens.tolist(), ranks.tolist(), strict=True):
            gate, up = gate_up(_fp32_copy(x_TH[token, None])).chunk(2, dim=1)
            hidden = (silu(gate) * up).to(x_TH.dtype)
            out_TH[token] += weights_TK[token, rank] * down(_fp32_copy(hidden))[0]
    return out_TH.to(x_TH.dtype)


def _experts(
    w13_EGH: Tensor, w2_EHF: Tensor, smaller: Smaller
) -> Iterator[Callable[[], tuple[Projection, Projection]]]:
    """Every slot's (gate and up, down), read when it is called."""
    for w13_GH, w2_HF in zip(w13_EGH, w2_EHF, strict=True):
        yield partial(_whole, w13_GH, w2_HF)
    for group in smaller:
        for tensors in zip(*group.tensors, strict=True):
            if isinstance(group, NarrowExperts):
                yield partial(_whole, *tensors)
            else:
                yield partial(_public_plus, w13_EGH[0], w2_EHF[0], *tensors)


def _whole(w13_GH: Tensor, w2_HF: Tensor) -> tuple[Projection, Projection]:
    gate_up, down = _fp32_copy(w13_GH), _fp32_copy(w2_HF)
    return lambda x_1H: linear(x_1H, gate_up), lambda hidden_1F: linear(hidden_1F, down)


def _public_plus(
    w13_GH: Tensor, w2_HF: Tensor, a13_QH: Tensor, b13_GR: Tensor, a2_RF: Tensor, b2_HR: Tensor
) -> tuple[Projection, Projection]:
    public_gate_up, public_down = _whole(w13_GH, w2_HF)
    pairs = zip(a13_QH.chunk(2), b13_GR.chunk(2), strict=True)
    gate, up = (_product(a_RH, b_FR) for a_RH, b_FR in pairs)
    down = _product(a2_RF, b2_HR)
    return (
        lambda x_1H: public_gate_up(x_1H) + torch.cat((gate(x_1H), up(x_1H)), dim=1),
        lambda hidden_1F: public_down(hidden_1F) + down(hidden_1F),
    )


def _product(a_RI: Tensor, b_OR: Tensor) -> Projection:
    missing = -a_RI.shape[0] % RANKS_AT_ONCE
    starts = range(0, a_RI.shape[0], RANKS_AT_ONCE)
    a, b = pad(_fp32_copy(a_RI), (0, 0, 0, missing)), pad(_fp32_copy(b_OR), (0, missing))
    blocks = [
        (_fp32_copy(a[start : start + RANKS_AT_ONCE]), _fp32_copy(b[:, start : start + RANKS_AT_ONCE]))
        for start in starts
    ]

    def product(x_1I: Tensor) -> Tensor:
        sum_1O = x_1I.new_zeros(1, b_OR.shape[0])
        for a_BI, b_OB in blocks:
            sum_1O = sum_1O + linear(linear(x_1I, a_BI), b_OB)
        return sum_1O

    return product


def _fp32_copy(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
