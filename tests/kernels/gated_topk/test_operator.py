"""The registered operator: what torch.compile sees of it, and which callers it refuses.

Shape suffixes: T tokens, E expert slots, K chosen experts.
"""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import flexgate.kernels.gated_topk as package
from flexgate.kernels.errors import KernelArgumentError, KernelError
from flexgate.kernels.gated_topk import cpu, gated_topk, gated_topk_reference, unit_map


def arguments(tokens: int = 5, slots: int = 7) -> dict[str, Any]:
    torch.manual_seed(tokens)
    return {
        "router_logits_TE": torch.randn(tokens, slots),
        "gate_T": torch.randint(1, 1 << slots, (tokens,)),
        "unit_E": unit_map(range(slots)),
        "top_k": 3,
        "renormalize": True,
        "bias_E": torch.randn(slots),
        "mass_TU": torch.zeros(tokens + 1, slots, dtype=torch.int64),
        "chosen_T": torch.zeros(tokens + 1, dtype=torch.int64),
        "fill": "first",
    }


def test_public_names() -> None:
    assert package.__all__ == [
        "CLOSED_GATE",
        "COMMON_UNIT",
        "MASS_SCALE",
        "MAX_EXPERTS",
        "MAX_UNITS",
        "Fill",
        "gated_topk",
        "gated_topk_reference",
        "unit_map",
    ]


def test_fake_implementation_and_mutation_are_declared_correctly() -> None:
    given = arguments()
    operands = [given[name] for name in ("router_logits_TE", "gate_T", "unit_E", "bias_E", "mass_TU", "chosen_T")]
    torch.library.opcheck(torch.ops.flexgate.gated_topk.default, (*operands, 3, True, -2))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager_bit_for_bit_and_keeps_the_accumulation(backend: str) -> None:
    unit_E = unit_map([0, 3, 3, 1, 0, 2, 5])

    def block(mass_TU: Tensor, chosen_T: Tensor, logits_TE: Tensor, gate_T: Tensor) -> tuple[Tensor, Tensor]:
        weights_TK, ids_TK = logits_TE[:, :2], gate_T[:, None]
        for layer in range(3):
            weights_TK, ids_TK = gated_topk(
                logits_TE * (layer + 1),
                gate_T,
                unit_E=unit_E,
                top_k=2,
                renormalize=False,
                bias_E=None,
                mass_TU=mass_TU,
                chosen_T=chosen_T,
                fill="first",
            )
        return weights_TK * 1, ids_TK + 0

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (1, 8, 13):
        given = arguments(tokens)
        results = []
        for function in (block, compiled):
            mass_TU, chosen_T = given["mass_TU"].clone(), given["chosen_T"].clone()
            outputs = function(mass_TU, chosen_T, given["router_logits_TE"], given["gate_T"])
            results.append((*outputs, mass_TU, chosen_T))
        assert all(torch.equal(eager, fused) for eager, fused in zip(*results, strict=True))
        assert int(results[0][2].sum()) > 0


def test_numpy_takes_over_where_nothing_can_be_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "_FLAGS", ["-no-such-flag-of-any-compiler"])
    cpu.native_library.cache_clear()
    try:
        given = arguments()
        without = gated_topk(**given)
        assert cpu.native_library() is None
    finally:
        monkeypatch.undo()
        cpu.native_library.cache_clear()
    assert "gated_topk runs on NumPy" in caplog.text
    expected = gated_topk_reference(**arguments())
    assert torch.equal(without[0], expected[0])
    assert torch.equal(without[1], expected[1])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("router_logits_TE", torch.zeros(5, 7, dtype=torch.bfloat16), "must be float32 [T, E], got torch.bfloat16"),
        ("router_logits_TE", torch.zeros(7), "must be float32 [T, E]"),
        ("router_logits_TE", torch.zeros(5, 513), "513 experts; a layer has 1..512"),
        ("router_logits_TE", torch.zeros(5, 0), "0 experts; a layer has 1..512"),
        ("unit_E", torch.zeros(7, dtype=torch.int8), "unit_E must be uint8 [7], got torch.int8 [7]"),
        ("unit_E", torch.zeros(6, dtype=torch.uint8), "unit_E must be uint8 [7], got torch.uint8 [6]"),
        ("gate_T", torch.zeros(5, dtype=torch.int32), "gate_T must be int64 [5], got torch.int32 [5]"),
        ("gate_T", torch.zeros(4, dtype=torch.int64), "gate_T must be int64 [5], got torch.int64 [4]"),
        ("bias_E", torch.zeros(6), "bias_E must be float32 [7]"),
        ("mass_TU", torch.zeros(4, 7, dtype=torch.int64), "mass_TU must be int64 [>=5, U]"),
        ("mass_TU", torch.zeros(5, 65, dtype=torch.int64), "mass_TU has 65 units; a gate names 1..64"),
        ("mass_TU", torch.zeros(5, 0, dtype=torch.int64), "mass_TU has 0 units; a gate names 1..64"),
        ("mass_TU", torch.zeros(7, 5, dtype=torch.int64).T, "must be contiguous"),
        ("chosen_T", torch.zeros(4, dtype=torch.int64), "chosen_T must be int64 [>=5]"),
        ("chosen_T", torch.zeros(10, dtype=torch.int64)[::2], "must be contiguous"),
        ("top_k", 0, "top_k must be at least 1, got 0"),
        ("fill", 7, 'fill must be "none", "first" or an expert in 0..6, got 7'),
        ("fill", "last", "got 'last'"),
        ("fill", True, "got True"),
    ],
)
@pytest.mark.parametrize("function", [gated_topk, gated_topk_reference])
def test_wrong_arguments_are_refused_by_name(function: Any, name: str, value: Any, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=re.escape(message)) as raised:
        function(**{**arguments(), name: value})
    assert isinstance(raised.value, KernelError)
    assert isinstance(raised.value, ValueError)


def test_the_checked_reference_refuses_to_fill_from_an_empty_gate() -> None:
    given = arguments()
    given["gate_T"][2] = 0
    with pytest.raises(KernelArgumentError, match="at least one allowed expert for every token"):
        gated_topk_reference(**given)
