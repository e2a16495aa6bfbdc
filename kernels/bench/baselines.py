"""What the kernels are compared with, apart from vLLM's: cuBLAS expert by expert, and torch's grouped product.

Both know on the host who goes where, which a server does not, and so leave that out of their time.

Shape suffixes: T tokens, K chosen experts, P real picks sorted by slot, H hidden, F expert intermediate, G = 2F.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import silu

from flexgate.kernels.bench.problem import Batch, Weights

Compute = Callable[[], Tensor]
"""Computes one layer's output, [T, H], when it is called."""


def per_expert_cublas(layer: Weights, batch: Batch) -> Compute:
    """Two matrix products for each expert that somebody chose."""
    chosen = []
    for slot in batch.used():
        tokens, ranks = (batch.ids_TK == slot).nonzero(as_tuple=True)
        chosen.append((slot, tokens, batch.weights_TK[tokens, ranks, None]))

    def compute() -> Tensor:
        out_TH = torch.zeros_like(batch.x_TH, dtype=torch.float32)
        for slot, tokens, share in chosen:
            gate, up = (batch.x_TH[tokens] @ layer.w13_EGH[slot].T).chunk(2, dim=1)
            expert = (silu(gate) * up) @ layer.w2_EHF[slot].T
            out_TH.index_add_(0, tokens, share * expert)
        return out_TH.to(batch.x_TH.dtype)

    return compute


def grouped_mm(layer: Weights, batch: Batch) -> Compute:
    """`torch._grouped_mm` over picks sorted by slot."""
    flat_P = batch.ids_TK.reshape(-1)
    order_P = torch.argsort(flat_P, stable=True)[int((flat_P < 0).sum()) :]
    token_P = order_P // batch.ids_TK.shape[1]
    share_P = batch.weights_TK.reshape(-1)[order_P, None]
    slots = torch.arange(layer.shape.slots, device=flat_P.device)
    ends_E = (flat_P[order_P][None, :] <= slots[:, None]).sum(1, dtype=torch.int32)
    up_EHG, down_EFH = layer.w13_EGH.transpose(1, 2), layer.w2_EHF.transpose(1, 2)

    def compute() -> Tensor:
        gate, up = torch._grouped_mm(batch.x_TH[token_P], up_EHG, offs=ends_E).chunk(2, dim=1)
        expert_PH = torch._grouped_mm(silu(gate) * up, down_EFH, offs=ends_E)
        out_TH = torch.zeros_like(batch.x_TH, dtype=torch.float32)
        return out_TH.index_add_(0, token_P, share_P * expert_PH).to(batch.x_TH.dtype)

    return compute
