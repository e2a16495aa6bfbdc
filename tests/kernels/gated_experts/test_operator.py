"""The registered operator on CPU tensors: schema, output argument, compilation, refusals.

Shape suffixes: T tokens, E expert slots, K chosen experts, H hidden, F expert intermediate, G = 2F.
"""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import flexgate.kernels.gated_experts as package
from flexgate.kernels.errors import KernelArgumentError, KernelUnavailableError
from flexgate.kernels.gated_experts import gated_experts, gated_experts_implementation, gated_experts_reference

NAMES = ("x_TH", "w13_EGH", "w2_EHF", "weights_TK", "ids_TK")


def test_public_names() -> None:
    assert package.__all__ == [
        "LowRankExperts",
        "NarrowExperts",
        "RoutingPlan",
        "Smaller",
        "gated_experts",
        "gated_experts_implementation",
        "gated_experts_reference",
        "routing_plan_reference",
    ]


def test_what_computes_is_named_and_what_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gated_experts_implementation(torch.device("cpu")) == "torch reference"
    with pytest.raises(KernelUnavailableError, match="meta is neither an NVIDIA GPU nor a CPU"):
        gated_experts_implementation(torch.device("meta"))
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    assert gated_experts_implementation(torch.device("cuda")) == "Triton on NVIDIA H200"
    capability[0] = (7, 5)
    with pytest.raises(KernelUnavailableError, match=r"compute capability 7\.5; bfloat16 matrix products need 8\.0"):
        gated_experts_implementation(torch.device("cuda"))


def test_cpu_operator_is_the_reference_and_fills_the_output_it_is_given(layer: Any) -> None:
    gated = layer(13, 7, dtype=torch.bfloat16)
    given_TH = torch.full_like(gated.x_TH, float("nan"))
    returned_TH = gated_experts(*gated.operands(), out_TH=given_TH)
    assert returned_TH is given_TH
    assert torch.equal(given_TH, gated.reference())
    assert torch.equal(gated_experts(*gated.operands()), given_TH)


def test_schema_and_mutation_are_declared_correctly(layer: Any) -> None:
    gated = layer(5, 3)
    torch.library.opcheck(torch.ops.flexgate.gated_experts.default, (*gated.operands(), torch.empty(5, 64)))


def test_compiled_equals_eager(layer: Any) -> None:
    def block(x_TH: Tensor, *others: Tensor) -> Tensor:
        return gated_experts(x_TH * 2, *others) + x_TH

    gated = layer(5, 3)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*gated.operands()), block(*gated.operands()))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x_TH", torch.zeros(5, 8, dtype=torch.int8), "x_TH must be bfloat16, float16 or float32 [T, H]"),
        ("x_TH", torch.zeros(8), "x_TH must be"),
        ("w2_EHF", torch.zeros(3, 9, 6), "w2_EHF must be torch.float32 [E, 8, F]"),
        ("w2_EHF", torch.zeros(3, 8, 6, dtype=torch.bfloat16), "got torch.bfloat16 [3, 8, 6]"),
        ("w13_EGH", torch.zeros(3, 6, 8), "w13_EGH must be torch.float32 [3, 12, 8], got torch.float32 [3, 6, 8]"),
        ("w13_EGH", torch.zeros(3, 8, 12).transpose(1, 2), "must be contiguous"),
        ("weights_TK", torch.zeros(4, 2), "weights_TK must be float32 [5, K]"),
        ("weights_TK", torch.zeros(5, 2, dtype=torch.bfloat16), "weights_TK must be float32 [5, K]"),
        ("ids_TK", torch.zeros(5, 3, dtype=torch.int32), "ids_TK must be int32 [5, 2]"),
        ("ids_TK", torch.zeros(5, 2, dtype=torch.int64), "got torch.int64 [5, 2]"),
    ],
)
@pytest.mark.parametrize("function", [gated_experts, gated_experts_reference])
def test_wrong_arguments_are_refused_by_name(layer: Any, function: Any, name: str, value: Tensor, message: str) -> None:
    operands = dict(zip(NAMES, layer(5, 3, hidden=8, intermediate=6, top_k=2).operands(), strict=True))
    with pytest.raises(KernelArgumentError, match=re.escape(message)):
        function(*{**operands, name: value}.values())


@pytest.mark.parametrize("out_TH", [torch.empty(5, 9), torch.empty(5, 8, dtype=torch.bfloat16), torch.empty(8, 5).T])
def test_an_output_that_does_not_fit_is_refused(layer: Any, out_TH: Tensor) -> None:
    with pytest.raises(KernelArgumentError, match=re.escape("out_TH must be contiguous torch.float32 [5, 8]")):
        gated_experts(*layer(5, 3, hidden=8, intermediate=6, top_k=2).operands(), out_TH=out_TH)
