"""Making a full expert smaller: by the singular values of its difference to the public one, or by its least neurons.

Nothing is trained and no text is read: how much of the *weights* is lost is measured, what that does to answers is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from flexgate.experts.checkpoint.base import BaseIdentity, read_shared
from flexgate.experts.checkpoint.layout import EXPERT_KEYS
from flexgate.experts.checkpoint.reader import CheckpointReader
from flexgate.experts.errors import LayoutError
from flexgate.experts.io.stream import Piece
from flexgate.experts.io.tensorfile import tensor_bytes
from flexgate.experts.package.size import PROJECTIONS, ExpertSize
from flexgate.experts.package.weights import Factors

ALL: Final = "all"
Errors = dict[str, float | list[dict[str, float]]]


class Loss(NamedTuple):
    """Squared Frobenius norms."""

    lost: float
    whole: float

    @property
    def relative(self) -> float:
        """The norm of what is lost over that of the whole; 0 of nothing."""
        return math.sqrt(self.lost / self.whole) if self.whole else 0.0


class Reduction:
    """One expert of a checkpoint at a smaller size, computed a layer at a time while it is written.

    Args:
        base: the checkpoint's base model; the public FFN that is subtracted is the one of its digests.
    """

    def __init__(self, checkpoint: CheckpointReader, index: int, size: ExpertSize, base: BaseIdentity) -> None:
        self._checkpoint, self._index, self._size, self._base = checkpoint, index, size, base
        self._layer, self._ffn = -1, tuple[Tensor, ...]()
        self._losses: list[dict[str, Loss]] = []

    def pieces(self, layer: int) -> dict[str, Piece]:
        """The FFN's tensors of one layer, to be written in this order, layer after layer."""
        shapes = self._size.ffn_shapes(self._base.architecture)

        def piece(number: int, shape: tuple[int, ...]) -> Piece:
            return Piece(self._checkpoint.dtype, shape, lambda: self._chunks(layer, number))

        return {key.format(layer=layer): piece(number, shape) for number, (key, shape) in enumerate(shapes.items())}

    def errors(self) -> Errors:
        """What was lost of what was reduced, as a ratio of Frobenius norms: of each projection, of all, of each layer.

        At a rank, what was reduced is the difference to the public expert; at a width, the expert itself.
        """
        names = (*PROJECTIONS, ALL)
        errors: Errors = {name: _sum(losses[name] for losses in self._losses).relative for name in names}
        errors["layers"] = [{name: losses[name].relative for name in names} for losses in self._losses]
        return errors

    def _chunks(self, layer: int, number: int) -> Iterable[memoryview]:
        if layer != self._layer:
            reduced, losses = self._narrow(layer) if self._size.rank is None else self._factored(layer, self._size.rank)
            self._layer, self._ffn = layer, tuple(reduced)
            by_name = dict(zip(PROJECTIONS, losses, strict=True))
            self._losses.append({**by_name, ALL: _sum(losses)})
        return (tensor_bytes(self._ffn[number]),)

    def _read(self, key: str) -> Tensor:
        tensor = self._checkpoint.read(key)
        if not tensor.isfinite().all():
            raise LayoutError(f"{key} has values that are not finite: a smaller expert cannot be made of it")
        return tensor

    def _factored(self, layer: int, rank: int) -> tuple[list[Tensor], list[Loss]]:
        parts, losses = [], []
        for key in EXPERT_KEYS:
            own = self._read(key.format(layer=layer, expert=self._index))
            public = read_shared(self._checkpoint, key.format(layer=layer, expert=0), self._base)
            factors, loss = factored(own.float() - public.float(), rank, own.dtype)
            parts += [factors.a_RI, factors.b_OR]
            losses.append(loss)
        return parts, losses

    def _narrow(self, layer: int) -> tuple[list[Tensor], list[Loss]]:
        gate, up, down = (self._read(key.format(layer=layer, expert=self._index)) for key in EXPERT_KEYS)
        assert self._size.width is not None
        kept = largest_neurons(gate, up, down, self._size.width)
        narrow = [gate[kept], up[kept], down[:, kept].contiguous()]
        losses = []
        for whole, part in zip((gate, up, down), narrow, strict=True):
            square = _square(whole)
            losses.append(Loss(max(0.0, square - _square(part)), square))
        return narrow, losses


def factored(difference_OI: Tensor, rank: int, dtype: torch.dtype) -> tuple[Factors, Loss]:
    """The best factors of a rank (Eckart and Young), each with the roots of the singular values, stored in ``dtype``.

    What is lost is measured on the stored factors.
    """
    u_ON, values_N, v_NI = torch.linalg.svd(difference_OI, full_matrices=False)
    roots_R = values_N[:rank].sqrt()
    factors = Factors((roots_R[:, None] * v_NI[:rank]).to(dtype), (u_ON[:, :rank] * roots_R).to(dtype))
    return factors, Loss(_square(difference_OI - factors.product()), _square(difference_OI))


def largest_neurons(gate_FH: Tensor, up_FH: Tensor, down_HF: Tensor, width: int) -> Tensor:
    """The ``width`` neurons with the largest product of their three vectors' norms, ascending; the first of equals."""
    size_F = gate_FH.double().norm(dim=1) * up_FH.double().norm(dim=1) * down_HF.double().norm(dim=0)
    return size_F.sort(descending=True, stable=True).indices[:width].sort().values


def _square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


def _sum(losses: Iterable[Loss]) -> Loss:
    lost, whole = (sum(numbers) for numbers in zip(*losses, strict=True))
    return Loss(lost, whole)
