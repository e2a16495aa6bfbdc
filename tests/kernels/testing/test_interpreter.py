"""Interpreting one launch leaves Triton able to compile the next."""

import pytest
import torch
import triton.language as tl
from triton import knobs
from triton.runtime.jit import JITFunction

from flexgate.kernels.gated_topk.contract import unit_map
from flexgate.kernels.gated_topk.kernel import gated_topk_kernel, launch_gated_topk
from flexgate.kernels.testing.configurations import Shape, compile_combine
from flexgate.kernels.testing.interpreter import Interpreted


def _launch(gate_T: torch.Tensor) -> torch.Tensor:
    tokens = len(gate_T)
    mass_TU, chosen_T = torch.zeros(tokens, 7, dtype=torch.int64), torch.zeros(tokens, dtype=torch.int64)
    operands = torch.zeros(tokens, 7), gate_T, unit_map(range(7)), None, mass_TU, chosen_T
    weights_TK, _ = launch_gated_topk(Interpreted(gated_topk_kernel), *operands, 2, False, -1)
    return weights_TK


def test_triton_is_put_back_after_a_launch() -> None:
    before = {holder: dict(vars(holder)) for holder in (tl, tl.core, tl.standard, tl.math, tl.tensor)}
    assert _launch(torch.tensor([1, 3])).tolist() == [[1.0, 0.0], [0.5, 0.5]]
    # Modules keep names that the interpreter's rewritten functions refer to; nothing that was there has changed.
    for holder, attributes in before.items():
        assert all(vars(holder)[name] is value for name, value in attributes.items())
    assert isinstance(tl.max, JITFunction)
    assert not knobs.runtime.interpret


def test_a_kernel_compiles_after_one_was_interpreted() -> None:
    _launch(torch.tensor([1]))
    assert compile_combine(Shape(hidden=64, intermediate=64, slots=3, top_k=2)).registers > 0


def test_triton_is_put_back_after_a_launch_that_failed() -> None:
    with pytest.raises(TypeError, match="gate_ptr"):
        Interpreted(gated_topk_kernel)[(1,)](None)
    assert isinstance(tl.max, JITFunction)
    assert not knobs.runtime.interpret
