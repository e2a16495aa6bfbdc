"""`gated_topk` for CPU tensors: a kernel in C that torch's dispatcher calls, or NumPy where nothing can be compiled.

Both equal the reference bit for bit, so which one runs is a matter of speed alone. The library is built once, by the
machinery that Triton uses for its own launchers: its choice of compiler, its cache directory, its trust in that. It is
taken into use only once its results on a trial have been those of NumPy.

Shape suffixes: T tokens, E experts of the layer, U units, K chosen experts.
"""

import ctypes
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexgate.kernels.errors import KernelUnavailableError
from flexgate.kernels.gated_topk.contract import FILL_FIRST, MAX_UNITS, check_arguments
from flexgate.kernels.gated_topk.vectorised import gated_topk_vectorised

_log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("native.c")
# Contraction would fuse a product and a sum into one rounding, and the bits would depend on the processor.
# What torch throws passes through the kernel's frame.
_FLAGS = ["-ffp-contract=off", "-fno-trapping-math", "-fexceptions"]
# Of libtorch's stable C interface, in the order in which native.c takes them; the last is C++'s operator delete.
_FUNCTIONS = [
    *("aoti_torch_library_init_impl", "aoti_torch_library_impl"),
    *("aoti_torch_get_data_ptr", "aoti_torch_get_dim", "aoti_torch_get_sizes", "aoti_torch_get_strides"),
    *("aoti_torch_get_dtype", "aoti_torch_empty_strided", "aoti_torch_delete_tensor_object"),
    *("torch_parallel_for", "aoti_torch_check", "_ZdlPv"),
]


def implement_on_cpu(library: torch.library.Library, name: str, trial: str) -> str:
    """Register the CPU kernel of the operator `name`, and say what it is.

    Args:
        library: of the namespace `flexgate`; both operators are defined.
        trial: an operator of the same schema, under which the compiled kernel is tried before.
    """
    try:
        register = _compiled()
        register(trial)
        if not _agrees(getattr(torch.ops.flexgate, trial).default):
            raise KernelUnavailableError("the compiled kernel's results differ from NumPy's")
        register(name)
    # No compiler, an unwritable cache, a Triton without this entry: whatever it is, NumPy gives the same bits.
    except Exception as error:
        _log.warning("gated_topk runs on NumPy, several times slower per call: %s", error)
        library.impl(name, _checked_vectorised, "CPU")
        return "NumPy"
    return "C"


def _checked_vectorised(*arguments: Any) -> tuple[Tensor, Tensor]:
    check_arguments(*arguments[:7])
    return gated_topk_vectorised(*arguments)


def _compiled() -> Callable[[str], None]:
    """Compile native.c, load it, and hand over libtorch's functions; returns what registers its kernel."""
    from triton.runtime.build import compile_so_from_file

    library = ctypes.CDLL(compile_so_from_file(str(_SOURCE), "flexgate_gated_topk", ccflags=_FLAGS))
    libtorch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    addresses = [ctypes.cast(getattr(libtorch, name), ctypes.c_void_p) for name in _FUNCTIONS]
    table = (ctypes.c_void_p * len(addresses))(*addresses)

    def register(name: str) -> None:
        if library.flexgate_register(table, name.encode()):
            raise KernelUnavailableError(f"torch {torch.__version__} did not take the compiled kernel")

    return register


def _agrees(compiled: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    """Whether all bits are NumPy's on random tokens with gates of every size, ties and an expert that is in no gate."""
    random, tokens, experts = torch.Generator().manual_seed(0), 64, 24
    logits_TE = (torch.randn(tokens, experts, generator=random, dtype=torch.float32) * 4).round(decimals=1)
    gate_T = torch.randint(-(2**62), 2**62, (tokens,), generator=random)
    unit_E = torch.randint(MAX_UNITS + 1, (experts,), generator=random).to(torch.uint8)
    bias_E = torch.randn(experts, generator=random, dtype=torch.float32)
    results = []
    for function in (compiled, gated_topk_vectorised):
        mass_TU, chosen_T = torch.zeros(tokens, MAX_UNITS, dtype=torch.int64), torch.zeros(tokens, dtype=torch.int64)
        outputs = function(logits_TE, gate_T, unit_E, bias_E, mass_TU, chosen_T, 5, True, FILL_FIRST)
        results.append((*outputs, mass_TU, chosen_T))
    return all(torch.equal(one, other) for one, other in zip(*results, strict=True))
