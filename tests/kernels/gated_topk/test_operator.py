"""The registered operator: what torch.compile sees of it, and which callers it refuses.

Shape suffixes: T tokens, E expert slots, K chosen experts.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import flexgate.kernels.gated_topk as package
from flexgate.kernels.errors import KernelArgumentError, KernelError
from flexgate.kernels.gated_topk import (
    cpu,
    gated_topk,
    gated_topk_implementation,
    gated_topk_reference,
    unit_map,
)


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
        "gated_topk_implementation",
        "gated_topk_reference",
        "unit_map",
    ]


def test_fake_implementation_and_mutation_are_declared_correctly() -> None:
    given = arguments()
    gated_topk_implementation(torch.device("cpu"))
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


WITHOUT_COMPILER = """
import logging, torch
from flexgate.kernels.gated_topk import gated_topk, gated_topk_implementation, gated_topk_reference, unit_map
logging.basicConfig(level="WARNING")
torch.manual_seed(0)
operands = {"router_logits_TE": torch.randn(5, 7), "gate_T": torch.tensor([-1, 1, 6, 7, 9])}
rest = {"unit_E": unit_map([0, 1, 1, 2, 0, 0, 3]), "top_k": 3, "renormalize": True, "bias_E": None, "fill": "none"}
results = []
for function in (gated_topk, gated_topk_reference):
    buffers = {"mass_TU": torch.zeros(5, 4, dtype=torch.int64), "chosen_T": torch.zeros(5, dtype=torch.int64)}
    results.append((*function(**operands, **rest, **buffers), *buffers.values()))
assert gated_topk_implementation(torch.device("cpu")) == "NumPy"
assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
compiled = torch.compile(lambda logits: gated_topk(logits, operands["gate_T"], **rest, **buffers)[0], backend="eager")
assert torch.equal(compiled(operands["router_logits_TE"]), results[0][0])
try:
    torch.ops.flexgate.gated_topk(torch.zeros(5), *[torch.zeros(1)] * 2, None, *[torch.zeros(1)] * 2, 1, False, -1)
except ValueError as error:
    print("refused:", error)
"""


def test_numpy_takes_over_where_nothing_can_be_compiled(tmp_path: Path) -> None:
    environment = {**os.environ, "CC": "/bin/false", "TRITON_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "gated_topk runs on NumPy, several times slower per call" in ran.stderr
    assert "refused: router_logits_TE must be float32 [T, E], got torch.float32 [5]" in ran.stdout


def test_a_compiled_kernel_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registered: list[str] = []
    library = SimpleNamespace(
        impl=lambda name, function, key: registered.append(f"{name} on {key}: {function.__name__}")
    )
    monkeypatch.setattr(cpu, "_compiled", lambda: lambda name: registered.append(name))
    monkeypatch.setattr(cpu, "_agrees", lambda compiled: False)
    assert cpu.implement_on_cpu(library, "gated_topk", "gated_topk_trial") == "NumPy"
    assert registered == ["gated_topk_trial", "gated_topk on CPU: _checked_vectorised"]
    assert "the compiled kernel's results differ from NumPy's" in caplog.text


@pytest.mark.parametrize("part", range(4))
def test_the_trial_notices_a_difference_in_any_result(part: int) -> None:
    def wrong(*operands: Any) -> tuple[Tensor, Tensor]:
        results = *cpu.gated_topk_vectorised(*operands), operands[4], operands[5]
        results[part][-1] += 1
        return results[0], results[1]

    assert cpu._agrees(cpu.gated_topk_vectorised)
    assert not cpu._agrees(wrong)


def test_the_trial_is_in_fp32_where_a_model_is_built_in_another_dtype() -> None:
    assert gated_topk_implementation(torch.device("cpu")) == "C"
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it builds one
    try:
        assert cpu._agrees(torch.ops.flexgate.gated_topk.default)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_cpu_kernel_is_named_and_built_once() -> None:
    assert gated_topk_implementation(torch.device("cpu")) == gated_topk_implementation(torch.device("cpu")) == "C"
    assert gated_topk_implementation(torch.device("cuda")) == "Triton"


WRONG_OPERANDS = [
    (0, torch.zeros(5, 7, dtype=torch.float64), "router_logits_TE must be float32 [T, E] with E in 1..512"),
    (0, torch.zeros(7), "router_logits_TE must be float32 [T, E] with E in 1..512"),
    (0, torch.zeros(5, 513), "router_logits_TE must be float32 [T, E] with E in 1..512"),
    (1, torch.zeros(4, dtype=torch.int64), "gate_T must be int64 [T]"),
    (1, torch.zeros(5, dtype=torch.int32), "gate_T must be int64 [T]"),
    (2, torch.zeros(6, dtype=torch.uint8), "unit_E must be uint8 [E]"),
    (2, torch.zeros(7, dtype=torch.int64), "unit_E must be uint8 [E]"),
    (3, torch.zeros(6), "bias_E must be float32 [E]"),
    (4, torch.zeros(4, 7, dtype=torch.int64), "mass_TU must be int64 [>=T, U] with U in 1..64"),
    (4, torch.zeros(5, 65, dtype=torch.int64), "mass_TU must be int64 [>=T, U] with U in 1..64"),
    (4, torch.zeros(7, 5, dtype=torch.int64).T, "mass_TU and chosen_T must be contiguous"),
    (5, torch.zeros(4, dtype=torch.int64), "chosen_T must be int64 [>=T]"),
    (5, torch.zeros(10, dtype=torch.int64)[::2], "mass_TU and chosen_T must be contiguous"),
    (6, 0, "top_k must be at least 1"),
    (8, 7, "fill must be an expert, -1 or -2"),
    (8, -3, "fill must be an expert, -1 or -2"),
]


@pytest.mark.parametrize(("place", "value", "message"), WRONG_OPERANDS)
def test_the_kernel_in_c_refuses_operands_that_it_would_read_past(place: int, value: Any, message: str) -> None:
    """`torch.ops.flexgate.gated_topk` is open to everybody, and memory is at stake."""
    given = arguments()
    names = ("router_logits_TE", "gate_T", "unit_E", "bias_E", "mass_TU", "chosen_T", "top_k", "renormalize")
    operands = [*(given[name] for name in names), -2]
    assert gated_topk_implementation(torch.device("cpu")) == "C"
    operands[place] = value
    for _ in range(3):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            torch.ops.flexgate.gated_topk.default(*operands)
    mass_TU, chosen_T = given["mass_TU"], given["chosen_T"]
    assert int(mass_TU.sum()) == int(chosen_T.sum()) == 0


def test_many_tokens_are_routed_by_several_threads_alike() -> None:
    torch.manual_seed(0)
    given = {**arguments(), "router_logits_TE": torch.randn(9000, 7), "gate_T": torch.randint(1, 1 << 7, (9000,))}
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            buffers = {"mass_TU": torch.zeros(9000, 7, dtype=torch.int64), "chosen_T": torch.zeros(9000).long()}
            results.append((*gated_topk(**{**given, **buffers}), *buffers.values()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_calls_leave_no_memory_behind() -> None:
    given = arguments(64)
    gated_topk(**given)
    before = _resident()
    for _ in range(60_000):
        gated_topk(**given)
    # A handle that stayed is 32 bytes, a result more than 200.
    assert _resident() - before < 1 << 20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


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
