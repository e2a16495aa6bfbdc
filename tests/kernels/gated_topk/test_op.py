"""The CPU operator against the specification, bit for bit.

Shape suffixes: T tokens, E expert slots, K chosen experts.
"""

import pytest
import torch
from flexgate.kernels.gated_topk import gated_topk, gated_topk_reference
from torch import Tensor

SENTINEL = -7777


def gates(tokens: int, slots: int) -> Tensor:
    allowed_TE = torch.rand(tokens, slots) < torch.rand(tokens, 1)
    allowed_TE[torch.arange(tokens), torch.randint(slots, (tokens,))] = True
    return (allowed_TE.long() << torch.arange(slots)).sum(dim=1)


@pytest.mark.parametrize("tokens", [1, 7, 13, 300])
@pytest.mark.parametrize("slots", [1, 2, 7, 9, 33, 64])
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("renormalize", [False, True])
def test_operator_equals_reference_bit_for_bit(tokens: int, slots: int, top_k: int, renormalize: bool) -> None:
    torch.manual_seed(tokens * slots + top_k)
    logits_TE, gate_T, bias_E = torch.randn(tokens, slots) * 3, gates(tokens, slots), torch.randn(slots)
    results = []
    for function in (gated_topk, gated_topk_reference):
        mass_TE, chosen_T = torch.full((tokens + 3, slots), SENTINEL), torch.zeros(tokens + 3, dtype=torch.int64)
        chosen_T[tokens:] = SENTINEL
        weights_TK, ids_TK = function(
            logits_TE, gate_T, top_k=top_k, renormalize=renormalize, bias_E=bias_E,
            mass_TE=mass_TE, chosen_T=chosen_T, fill="first",
        )
        assert (mass_TE[tokens:] == SENTINEL).all() and (chosen_T[tokens:] == SENTINEL).all()
        results.append((weights_TK, ids_TK, mass_TE, chosen_T))
    for ours, specified in zip(*results, strict=True):
        assert ours.dtype == specified.dtype and torch.equal(ours, specified)
