"""The kernels' values against the reference, over ragged shapes.

Bit for bit once the reference adds its products in the order that the kernels promise (ascending, into one fp32
accumulator) and takes NumPy's exponential, which is the interpreter's. Against the reference as it stands, whose order
is torch's, by maximum and root-mean-square error.

Shape suffixes: T tokens, E expert slots, K chosen experts, H hidden, F expert intermediate.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flexgate.kernels.gated_experts import gated_experts_reference, reference


def assert_close(ours_TH: Tensor, specified_TH: Tensor, *, maximum: float, rms: float) -> None:
    """Errors relative to the reference's root mean square."""
    error_TH = (ours_TH.double() - specified_TH.double()).abs()
    scale = float(specified_TH.double().square().mean().sqrt())
    assert float(error_TH.max()) <= maximum * scale
    assert float(error_TH.square().mean().sqrt()) <= rms * scale


@pytest.mark.parametrize(("tokens", "slots"), [(1, 7), (7, 9), (5, 64), (13, 1)])
@pytest.mark.parametrize(("hidden", "intermediate"), [(32, 96), (80, 352)])
def test_fp32_values(run: Any, layer: Any, tokens: int, slots: int, hidden: int, intermediate: int) -> None:
    gated = layer(tokens, slots, hidden=hidden, intermediate=intermediate)
    assert_close(run(gated), gated.reference(), maximum=5e-6, rms=1e-6)


def test_fp32_values_of_many_tokens(run: Any, layer: Any) -> None:
    gated = layer(300, 4, hidden=32, intermediate=32, top_k=2)
    assert_close(run(gated), gated.reference(), maximum=5e-6, rms=1e-6)


@pytest.mark.parametrize("use_tma", [False, True])
def test_bf16_values(run: Any, layer: Any, use_tma: bool) -> None:
    gated = layer(13, 7, intermediate=352, dtype=torch.bfloat16)
    assert_close(run(gated, use_tma=use_tma), gated.reference(), maximum=0.02, rms=0.001)


def ordered_linear(rows_RD: Tensor, weight_ND: Tensor) -> Tensor:
    sum_RN = torch.zeros(len(rows_RD), len(weight_ND))
    for d in range(rows_RD.shape[1]):
        sum_RN += rows_RD[:, d, None] * weight_ND[None, :, d]
    return sum_RN


def numpy_silu(gate_RF: Tensor) -> Tensor:
    return gate_RF / (1 + torch.from_numpy(np.exp(-gate_RF.numpy())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 96), (48, 352)])
def test_values_equal_the_reference_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, run: Any, layer: Any, dtype: torch.dtype, hidden: int, intermediate: int
) -> None:
    monkeypatch.setattr(reference, "linear", ordered_linear)
    monkeypatch.setattr(reference, "silu", numpy_silu)
    gated = layer(13, 9, hidden=hidden, intermediate=intermediate, top_k=4, dtype=dtype)
    assert torch.equal(run(gated), gated.reference())


@pytest.mark.parametrize(("hidden", "intermediate"), [(7, 33), (65, 1)])
def test_sizes_that_no_tile_divides_and_tma_cannot_address(
    run: Any, layer: Any, hidden: int, intermediate: int
) -> None:
    gated = layer(5, 3, hidden=hidden, intermediate=intermediate, top_k=2)
    assert_close(run(gated), gated.reference(), maximum=5e-6, rms=1e-6)


def test_the_reference_is_the_formula() -> None:
    x_TH, w13_EGH, w2_EHF = torch.tensor([[2.0]]), torch.tensor([[[3.0], [5.0]]]), torch.tensor([[[7.0]]])
    out_TH = gated_experts_reference(x_TH, w13_EGH, w2_EHF, torch.tensor([[0.5]]), torch.zeros(1, 1, dtype=torch.int32))
    silu_of_six = 6 / (1 + torch.tensor(-6.0).exp())
    torch.testing.assert_close(out_TH, 0.5 * 7 * (silu_of_six * 10)[None, None])


@pytest.mark.parametrize("elsewhere", [-1, 9, 2**30])
def test_ids_of_experts_on_other_ranks_are_skipped(run: Any, layer: Any, elsewhere: int) -> None:
    """Slots dealt out to three ranks; what the ranks' outputs add up to is the whole layer."""
    gated = layer(13, 7, hidden=32, intermediate=48, top_k=4)
    shares = []
    for rank in range(3):
        share = gated.with_slots(list(range(rank, 7, 3)))
        share = replace(share, ids_TK=torch.where(share.ids_TK < 0, elsewhere, share.ids_TK).int())
        shares.append(run(share))
        assert torch.equal(shares[-1] == 0, (share.reference() == 0))
    assert_close(torch.stack(shares).sum(0), gated.reference(), maximum=5e-6, rms=1e-6)


@pytest.mark.parametrize("tokens", [2, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_the_reference_does_not_depend_on_how_many_others_chose_its_expert(
    layer: Any, tokens: int, dtype: torch.dtype
) -> None:
    gated = layer(tokens, 3, hidden=128, intermediate=96, top_k=2, dtype=dtype)
    whole_TH = gated.reference()
    for token in range(tokens):
        assert torch.equal(gated.with_tokens([token]).reference()[0], whole_TH[token])
