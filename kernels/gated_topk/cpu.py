"""`gated_topk` for CPU tensors: compiled C, or NumPy where nothing can be compiled.

Both equal the reference bit for bit, so which one runs is a matter of speed alone. The library is built once, by the
machinery that Triton uses for its own launchers: its choice of compiler, its cache directory, its trust in that.

Shape suffixes: T tokens, E experts of the layer, U units, K chosen experts.
"""

import ctypes
import functools
import logging
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from flexgate.kernels.gated_topk.contract import empty_results
from flexgate.kernels.gated_topk.vectorised import gated_topk_vectorised

_log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("native.c")
# Contraction would fuse a product and a sum into one rounding, and the bits would depend on the processor.
_FLAGS = ["-ffp-contract=off"]
_POINTERS = frozenset({"logits", "gate", "unit", "bias", "mass", "chosen", "weights", "ids"})
_FIELDS = [
    "logits",
    "logits_row",
    "logits_column",
    "gate",
    "gate_step",
    "unit",
    "unit_step",
    "bias",
    "bias_step",
    "mass",
    "chosen",
    "weights",
    "ids",
    "tokens",
    "experts",
    "units",
    "top_k",
    "renormalize",
    "fill",
]


class _Routing(ctypes.Structure):
    """The argument of the C function, field by field."""

    _fields_ = [(name, ctypes.c_void_p if name in _POINTERS else ctypes.c_int64) for name in _FIELDS]


@functools.cache
def native_library() -> Callable[..., None] | None:
    """The compiled function, or None where it cannot be had (logged once)."""
    try:
        from triton.runtime.build import compile_so_from_file

        library = ctypes.CDLL(compile_so_from_file(str(_SOURCE), "flexgate_gated_topk", ccflags=_FLAGS))
    # No compiler, an unwritable cache, a Triton without this entry: whatever it is, NumPy gives the same bits.
    except Exception as error:
        _log.warning("gated_topk runs on NumPy, several times slower per call: %s", error)
        return None
    function: Callable[..., None] = library.flexgate_gated_topk
    return function


def gated_topk_cpu(
    router_logits_TE: Tensor,
    gate_T: Tensor,
    unit_E: Tensor,
    bias_E: Tensor | None,
    mass_TU: Tensor,
    chosen_T: Tensor,
    top_k: int,
    renormalize: bool,
    fill: int,
) -> tuple[Tensor, Tensor]:
    """See `gated_topk_reference`; equal to it bit for bit, attribution included."""
    function = native_library()
    if function is None:
        return gated_topk_vectorised(
            router_logits_TE, gate_T, unit_E, bias_E, mass_TU, chosen_T, top_k, renormalize, fill
        )
    tokens, experts = router_logits_TE.shape
    weights_TK, ids_TK = empty_results(router_logits_TE, top_k)
    bias = (None, 0) if bias_E is None else (bias_E.data_ptr(), bias_E.stride(0))
    function(
        ctypes.byref(
            _Routing(
                router_logits_TE.data_ptr(), *router_logits_TE.stride(), gate_T.data_ptr(), gate_T.stride(0),
                unit_E.data_ptr(), unit_E.stride(0), *bias, mass_TU.data_ptr(), chosen_T.data_ptr(),
                weights_TK.data_ptr(), ids_TK.data_ptr(),
                tokens, experts, mass_TU.shape[1], top_k, renormalize, fill,
            )
        )
    )  # fmt: skip
    return weights_TK, ids_TK
