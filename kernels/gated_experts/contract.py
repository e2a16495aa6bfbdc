"""What `gated_experts` takes, on every device; no check looks at a value.

Shape suffixes: T tokens, E expert slots, K chosen experts, H hidden, F expert intermediate, G = 2F.
"""

import torch
from torch import Tensor

from flexgate.kernels.errors import KernelArgumentError

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_arguments(x_TH: Tensor, w13_EGH: Tensor, w2_EHF: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> None:
    """Raise KernelArgumentError unless shapes, dtypes and layout fit together."""
    if x_TH.dim() != 2 or x_TH.dtype not in _DTYPES:
        raise _wrong("x_TH", x_TH, "bfloat16, float16 or float32 [T, H]")
    tokens, hidden = x_TH.shape
    if w2_EHF.dim() != 3 or w2_EHF.shape[1] != hidden or w2_EHF.dtype is not x_TH.dtype:
        raise _wrong("w2_EHF", w2_EHF, f"{x_TH.dtype} [E, {hidden}, F]")
    slots, _, intermediate = w2_EHF.shape
    if w13_EGH.shape != (slots, 2 * intermediate, hidden) or w13_EGH.dtype is not x_TH.dtype:
        raise _wrong("w13_EGH", w13_EGH, f"{x_TH.dtype} [{slots}, {2 * intermediate}, {hidden}]")
    if weights_TK.dim() != 2 or weights_TK.shape[0] != tokens or weights_TK.dtype is not torch.float32:
        raise _wrong("weights_TK", weights_TK, f"float32 [{tokens}, K]")
    if ids_TK.shape != weights_TK.shape or ids_TK.dtype is not torch.int32:
        raise _wrong("ids_TK", ids_TK, f"int32 {list(weights_TK.shape)}")
    # The experts are far too large to be copied in silence.
    if not (w13_EGH.is_contiguous() and w2_EHF.is_contiguous()):
        raise KernelArgumentError("w13_EGH and w2_EHF must be contiguous")


def _wrong(name: str, tensor: Tensor, expected: str) -> KernelArgumentError:
    return KernelArgumentError(f"{name} must be {expected}, got {tensor.dtype} {list(tensor.shape)}")
