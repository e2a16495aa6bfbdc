"""Run a Triton kernel through Triton's interpreter inside a process that also compiles kernels.

Triton reads TRITON_INTERPRET once, when it is imported, and every `@triton.jit` function of that process, its own
library included, becomes one or the other. Here the choice is made per launch: for the length of a launch the jitted
functions that the kernel can reach are replaced by interpreted ones, and afterwards everything is put back, also what
the interpreter itself leaves behind in `triton.language`.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton import knobs
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

_MODULES = (tl, tl.core, tl.standard, tl.math, tl.random)
_CLASSES = (tl.tensor, tl.core.tensor_descriptor_base)


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


@functools.cache
def _twin(function: Any) -> Any:
    return InterpretedFunction(function.fn)


@contextmanager
def _interpreted_functions(kernel_globals: dict[str, Any]) -> Iterator[None]:
    jitted = {name: value for name, value in kernel_globals.items() if isinstance(value, JITFunction)}
    originals = [(holder, dict(vars(holder))) for holder in (*_MODULES, *_CLASSES)]
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        try:
            kernel_globals.update({name: _twin(function) for name, function in jitted.items()})
            for module in _MODULES:
                for name, value in list(vars(module).items()):
                    if isinstance(value, JITFunction):
                        setattr(module, name, _twin(value))
            yield
        finally:
            kernel_globals.update(jitted)
            for holder, attributes in originals:
                for name, value in attributes.items():
                    if vars(holder).get(name) is not value:
                        setattr(holder, name, value)
