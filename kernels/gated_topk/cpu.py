"""`gated_topk` for CPU tensors: compiled C around torch's exponential, or NumPy where nothing can be compiled.

Both equal the reference bit for bit, so which one runs is a matter of speed alone. The library is built once, by the
machinery that Triton uses for its own launchers: its choice of compiler, its cache directory, its trust in that.

Shape suffixes: T tokens, E expert slots, K chosen experts.
"""

import ctypes
import functools
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flexgate.kernels.gated_topk.contract import empty_results
from flexgate.kernels.gated_topk.vectorised import gated_topk_vectorised

_log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("native.c")
# Contraction would fuse a product and a sum into one rounding, and the bits would depend on the processor.
_FLAGS = ["-ffp-contract=off"]


@functools.cache
def native_library() -> tuple[Callable[..., None], Callable[..., None]] | None:
    """The compiled steps before and after the exponential, or None where they cannot be had (logged once)."""
    try:
        from triton.runtime.build import compile_so_from_file

        library = ctypes.CDLL(compile_so_from_file(str(_SOURCE), "flexgate_gated_topk", ccflags=_FLAGS))
    # No compiler, an unwritable cache, a Triton without this entry: whatever it is, NumPy gives the same bits.
    except Exception as error:
        _log.warning("gated_topk runs on NumPy, several times slower per call: %s", error)
        return None
    shift, pick = library.flexgate_gated_shift, library.flexgate_gated_pick
    shift.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2
    pick.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 5
    shift.restype = pick.restype = None
    return shift, pick


def gated_topk_cpu(
    router_logits_TE: Tensor,
    gate_T: Tensor,
    bias_E: Tensor | None,
    mass_TE: Tensor,
    chosen_T: Tensor,
    top_k: int,
    renormalize: bool,
    fill: int,
) -> tuple[Tensor, Tensor]:
    """See `gated_topk_reference`; equal to it bit for bit, attribution included."""
    library = native_library()
    if library is None:
        return gated_topk_vectorised(router_logits_TE, gate_T, bias_E, mass_TE, chosen_T, top_k, renormalize, fill)
    shift, pick = library
    tokens, slots = router_logits_TE.shape
    logits_TE, gate_T = router_logits_TE.contiguous(), gate_T.contiguous()
    # The name keeps a copy alive for as long as its address is in use.
    bias_E = None if bias_E is None else bias_E.contiguous()
    prob_TE = torch.empty_like(logits_TE)
    weights_TK, ids_TK = empty_results(logits_TE, top_k)
    gate, prob = gate_T.data_ptr(), prob_TE.data_ptr()
    bias = None if bias_E is None else bias_E.data_ptr()
    shift(logits_TE.data_ptr(), gate, bias, prob, tokens, slots)
    prob_TE.exp_()
    pick(
        prob, gate, mass_TE.data_ptr(), chosen_T.data_ptr(), weights_TK.data_ptr(), ids_TK.data_ptr(),
        tokens, slots, top_k, renormalize, fill,
    )  # fmt: skip
    return weights_TK, ids_TK
