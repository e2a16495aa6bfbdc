"""Run a Triton kernel through Triton's interpreter inside a process that also compiles kernels.

Triton reads TRITON_INTERPRET once, when it is imported, and every `@triton.jit` function of that process, its own
library included, becomes one or the other. Here the choice is made per launch: for the length of a launch the jitted
functions that the kernel can reach are replaced by interpreted ones, and afterwards everything is put back, also what
the interpreter itself leaves behind in `triton.language`.

Two of the interpreter's operations are replaced, so that it computes what the kernels' contract says:
- `tl.dot` adds its products one after another in fp32. Its own calls a BLAS, whose order of additions depends on the
  shape, so that no statement about bits would mean anything; and it multiplies bfloat16 by bit pattern.
- fp32 → bfloat16 rounds half to even, as the hardware does; its own truncates.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language import core
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle, _patch_lang
from triton.runtime.jit import JITFunction

from flexgate.kernels.gated_experts import kernel
from flexgate.kernels.gated_experts.launch import Kernels, launch_gated_experts
from flexgate.kernels.gated_experts.tiles import tile_table
from flexgate.kernels.gated_topk import gated_topk_implementation
from flexgate.kernels.gated_topk.kernel import gated_topk_kernel, launch_gated_topk

_OVERRIDES = torch.library.Library("flexgate", "IMPL")
_MODULES = (tl, core, tl.standard, tl.math, tl.random)


class Interpreted:
    """A kernel with the launch syntax of a compiled one: `Interpreted(kernel)[grid](*arguments, **constants)`."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """A launcher over `grid`; options that only the compiler reads are accepted and ignored."""

        def launch(*arguments: Any, **constants: Any) -> None:
            # NaN and infinity are inputs like any other; NumPy would warn about each.
            with np.errstate(all="ignore"), _interpreted_functions(self._kernel.fn.__globals__):
                _twin(self._kernel)[grid](*arguments, **constants)

        return launch


def interpreted_experts() -> Kernels:
    """The kernels of `gated_experts` for tensors in CPU memory: few programs, weights through descriptors."""
    return Kernels(
        Interpreted(kernel.plan_kernel),
        Interpreted(kernel.gate_up_kernel),
        Interpreted(kernel.down_kernel),
        Interpreted(kernel.combine_kernel),
        programs=3,
        use_tma=True,
    )


def interpret_operators() -> Counter[str]:
    """Make both operators compute CPU tensors with the interpreted kernels, in this process and for good.

    Returns how often each operator has been called since; it grows with every call.
    """
    # Registered now, and not over what is registered here.
    gated_topk_implementation(torch.device("cpu"))
    calls: Counter[str] = Counter()
    routing, kernels = Interpreted(gated_topk_kernel), interpreted_experts()

    def topk(*arguments: Any) -> tuple[Tensor, Tensor]:
        calls["gated_topk"] += 1
        return launch_gated_topk(routing, *arguments)

    def experts(x_TH: Tensor, w13_EGH: Tensor, w2_EHF: Tensor, *routed: Tensor) -> None:
        calls["gated_experts"] += 1
        dtype = str(x_TH.dtype).removeprefix("torch.")
        table = tile_table(x_TH.shape[1], w2_EHF.shape[2], dtype, "interpreter", "interpreter")
        launch_gated_experts(kernels, table.choose(len(x_TH)), x_TH, w13_EGH, w2_EHF, *routed)

    _OVERRIDES.impl("gated_topk", topk, "CPU", allow_override=True)
    _OVERRIDES.impl("gated_experts", experts, "CPU", allow_override=True)
    return calls


class _Twin(InterpretedFunction):
    """Called from a running kernel: everything is patched by then, and doing so again would be most of the work."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.rewrite()(*arguments, **named)


@functools.cache
def _twin(function: Any) -> _Twin:
    twin = _Twin(function.fn)
    twin.rewrite()
    return twin


@contextmanager
def _interpreted_functions(kernel_globals: dict[str, Any]) -> Iterator[None]:
    namespaces = (kernel_globals, *(vars(module) for module in _MODULES))
    jitted = [
        {name: value for name, value in list(namespace.items()) if isinstance(value, JITFunction)}
        for namespace in namespaces
    ]
    # Made before anything is patched: making one looks through everything that its function refers to.
    twins = [{name: _twin(function) for name, function in functions.items()} for functions in jitted]
    builtin_dot, builtin_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        # Patches the modules that a function can see by name; here `tl` and `core`.
        scope = _patch_lang(_ordered_dot)
        try:
            InterpreterBuilder.create_dot = _ordered_dot
            InterpreterBuilder.cast_impl = _rounding_cast(builtin_cast)
            for namespace, interpreted in zip(namespaces, twins, strict=True):
                namespace.update(interpreted)
            yield
        finally:
            for namespace, functions in zip(namespaces, jitted, strict=True):
                namespace.update(functions)
            InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = builtin_dot, builtin_cast
            scope.restore()


def _ordered_dot(
    _builder: InterpreterBuilder, left: TensorHandle, right: TensorHandle, total: TensorHandle, *_precision: Any
) -> TensorHandle:
    left_MK, right_KN, total_MN = _as_fp32(left), _as_fp32(right), _as_fp32(total).copy()
    for k in range(left_MK.shape[1]):
        total_MN += left_MK[:, k, None] * right_KN[None, k, :]
    return TensorHandle(total_MN, tl.float32)


def _as_fp32(handle: TensorHandle) -> npt.NDArray[np.float32]:
    # The interpreter stores bfloat16 as the upper half of an fp32.
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(handle.data, dtype=np.float32)


def _rounding_cast(cast: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def rounding(builder: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(builder, source, target)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        upper = np.where(np.isnan(source.data), np.uint32(0x7FC0), rounded).astype(np.uint16)
        return TensorHandle(upper.reshape(source.data.shape), tl.bfloat16)

    return rounding
