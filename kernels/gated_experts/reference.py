"""The specification of `gated_experts`, in torch, computing in fp32.

Shape suffixes: T tokens, E expert slots, K chosen experts, H hidden, F expert intermediate, G = 2F gate rows then up
rows.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from flexgate.kernels.gated_experts.contract import check_arguments


def gated_experts_reference(
    x_TH: Tensor, w13_EGH: Tensor, w2_EHF: Tensor, weights_TK: Tensor, ids_TK: Tensor
) -> Tensor:
    """The chosen experts' SwiGLU networks, weighted and added up.

    With the real picks of token t (ids within 0..E−1, weight not exactly 0) in ascending slot order:

        h(t, e) = round( silu(w13[e, :F] · x[t]) ∘ (w13[e, F:] · x[t]) )   rounded once, to the dtype of x
        out[t]  = round( Σ_e weights(t, e) · (w2[e] · h(t, e)) )          fp32, a left fold in slot order from 0

    x_TH, w13_EGH, w2_EHF: one floating dtype; weights_TK fp32; ids_TK int32. Returns out_TH in the dtype of x. A token
    without a real pick gets zeros. A slot that no real pick names is not read.
    """
    check_arguments(x_TH, w13_EGH, w2_EHF, weights_TK, ids_TK)
    intermediate = w2_EHF.shape[2]
    out_TH = torch.zeros_like(x_TH, dtype=torch.float32)
    for slot in range(w13_EGH.shape[0]):
        tokens, ranks = ((ids_TK == slot) & (weights_TK != 0)).nonzero(as_tuple=True)
        if len(tokens) == 0:
            continue
        # One row at a time, from copies: a BLAS rounds by the number of rows and by alignment, and a token must not
        # see how many others chose its expert.
        w13_GH, w2_HF = _fp32_copy(w13_EGH[slot]), _fp32_copy(w2_EHF[slot])
        for token, rank in zip(tokens.tolist(), ranks.tolist(), strict=True):
            gate_up = linear(_fp32_copy(x_TH[token, None]), w13_GH)
            hidden = silu(gate_up[:, :intermediate]) * gate_up[:, intermediate:]
            expert = linear(_fp32_copy(hidden.to(x_TH.dtype)), w2_HF)
            out_TH[token] += weights_TK[token, rank] * expert[0]
    return out_TH.to(x_TH.dtype)


def _fp32_copy(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
