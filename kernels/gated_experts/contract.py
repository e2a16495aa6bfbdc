"""What `gated_experts` takes, on every device; no check looks at a value.

Shape suffixes: T tokens, E slots of full experts, K chosen experts, H hidden, F expert intermediate, G = 2F. Of slots
of one smaller size also S slots, W their width, V = 2W; R rank, Q = 2R.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgate.kernels.errors import KernelArgumentError

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class NarrowExperts:
    """Slots of experts with fewer neurons, in the layout of full ones."""

    w13_SVH: Tensor
    """W gate rows, then W up rows."""
    w2_SHW: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of the fields."""
        return self.w13_SVH, self.w2_SHW

    def shapes(self, hidden: int, intermediate: int) -> tuple[tuple[int, ...], ...]:  # noqa: ARG002
        """What the tensors must have, given the first sizes of their own."""
        slots, width = len(self.w2_SHW), self.w2_SHW.shape[-1]
        return (slots, 2 * width, hidden), (slots, hidden, width)


@dataclass(frozen=True, slots=True)
class LowRankExperts:
    """Slots of experts that are the public one, slot 0 of the full ones, plus a product of factors per projection."""

    a13_SQH: Tensor
    """R gate rows, then R up rows."""
    b13_SGR: Tensor
    """F gate rows, to be multiplied with the gate rows of A; then F up rows, with the up rows."""
    a2_SRF: Tensor
    b2_SHR: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of the fields."""
        return self.a13_SQH, self.b13_SGR, self.a2_SRF, self.b2_SHR

    def shapes(self, hidden: int, intermediate: int) -> tuple[tuple[int, ...], ...]:
        """What the tensors must have, given the first sizes of their own."""
        slots, rank = len(self.b2_SHR), self.b2_SHR.shape[-1]
        return (
            (slots, 2 * rank, hidden),
            (slots, 2 * intermediate, rank),
            (slots, rank, intermediate),
            (slots, hidden, rank),
        )


Smaller = Sequence[NarrowExperts | LowRankExperts]
"""Slots of smaller sizes. Their ids follow those of full experts, in this order."""


def check_arguments(
    x_TH: Tensor, w13_EGH: Tensor, w2_EHF: Tensor, weights_TK: Tensor, ids_TK: Tensor, smaller: Smaller = ()
) -> None:
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
    for group in smaller:
        _check_smaller(group, x_TH, intermediate)
    if slots == 0 and any(isinstance(group, LowRankExperts) for group in smaller):
        raise KernelArgumentError("w13_EGH must have slot 0, the public expert that low-rank experts are added to")


def _check_smaller(group: NarrowExperts | LowRankExperts, x_TH: Tensor, intermediate: int) -> None:
    names = group.__dataclass_fields__
    last = group.tensors[-1]
    if last.dim() != 3:
        raise _wrong([*names][-1], last, f"{x_TH.dtype} of 3 dimensions")
    shapes = group.shapes(x_TH.shape[1], intermediate)
    for name, tensor, shape in zip(names, group.tensors, shapes, strict=True):
        if tensor.shape != shape or tensor.dtype is not x_TH.dtype or 0 in shape:
            raise _wrong(name, tensor, f"{x_TH.dtype} {list(shape)}, none of them 0")
        if not tensor.is_contiguous():
            raise KernelArgumentError(f"{name} must be contiguous")


def _wrong(name: str, tensor: Tensor, expected: str) -> KernelArgumentError:
    return KernelArgumentError(f"{name} must be {expected}, got {tensor.dtype} {list(tensor.shape)}")
