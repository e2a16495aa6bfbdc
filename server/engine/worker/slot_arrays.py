"""The experts of one layer on one rank as plain arrays: write a slot's, read it back, clear it.

Nothing here knows vLLM, so that the same code runs in a worker and in a fault test. What a
kernel wants an expert to look like is the ``pack`` of its arrays; everything else is copying.

Legend: E experts of the layer, L experts that this rank holds, H hidden, F expert intermediate of the whole
expert, P the same of this rank's shard with the kernel's padding, G = 2P.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgate.experts.package.weights import ExpertLayer


class ReadBackError(RuntimeError):
    """Memory does not hold what was written into it."""


class SlotShapeError(RuntimeError):
    """A slot has not the experts that are to be written into it."""


Pack = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""[G, H] and [H, P] in plain layout → the same in the layout that the kernel reads."""


def plain(w13_GH: Tensor, w2_HP: Tensor) -> tuple[Tensor, Tensor]:
    """The layout of a checkpoint, which Triton kernels read as it is."""
    return w13_GH, w2_HP


@dataclass(frozen=True, slots=True)
class SlotArrays:
    """One layer's experts on one rank, and the slot that each belongs to.

    Attributes:
        unit_E: the slot of each expert, a byte each.
        router_EH, bias_E: on every rank alike; more rows than experts may be there.
        w13_LGH, w2_LHP: this rank's shard, packed.
        local: expert → index into the packed arrays, or -1 where another rank holds the expert.
        shards, shard: into how many parts an expert's intermediate size is cut, and which is here.
        pack: the kernel's layout.
    """

    unit_E: bytes
    router_EH: Tensor
    bias_E: Tensor
    w13_LGH: Tensor
    w2_LHP: Tensor
    local: Callable[[int], int]
    pack: Pack = plain
    shards: int = 1
    shard: int = 0

    def only_expert(self, slot: int) -> int:
        """The expert that ``slot`` is made of here; raises `SlotShapeError` unless there is exactly one."""
        experts = self._experts(slot)
        if len(experts) != 1:
            raise SlotShapeError(f"slot {slot} has {len(experts)} experts in a layer; a package has one")
        return experts[0]

    def write(self, slot: int, expert: ExpertLayer) -> None:
        """Copy ``expert`` into ``slot`` and read it back.

        Raises:
            SlotShapeError: the slot has not one expert in this layer; nothing was written.
            ReadBackError: the slot does not hold what was written, bit for bit.
        """
        index = self.only_expert(slot)
        for part, value in zip(self._parts(index), self._resident(index, expert), strict=True):
            part.copy_(value)
            if not same_bits(part, value):
                raise ReadBackError(f"slot {slot} does not hold what was written into it")

    def clear(self, slot: int) -> None:
        """Zero ``slot`` and read it back.

        Raises:
            ReadBackError: a bit of it is not zero.
        """
        for part in self._parts(*self._experts(slot)):
            part.zero_()
            if _bytes(part).any():
                raise ReadBackError(f"slot {slot} is not zero after it was cleared")

    def digest(self, slot: int) -> bytes:
        """SHA-256 over what is resident in ``slot`` here."""
        hasher = hashlib.sha256()
        for part in self._parts(*self._experts(slot)):
            hasher.update(_bytes(part).cpu().numpy().data)
        return hasher.digest()

    def _experts(self, slot: int) -> list[int]:
        return [expert for expert, unit in enumerate(self.unit_E) if unit == slot]

    def _parts(self, *experts: int) -> list[Tensor]:
        parts = []
        for expert in experts:
            parts += [self.router_EH[expert], self.bias_E[expert : expert + 1]]
            index = self.local(expert)
            if index >= 0:
                parts += [self.w13_LGH[index], self.w2_LHP[index]]
        return parts

    def _resident(self, index: int, expert: ExpertLayer) -> Sequence[Tensor]:
        """``expert`` as :meth:`_parts` should hold it; the bias can only lower a logit."""
        bias = self.bias_E.new_zeros(1)
        if expert.router_bias is not None:
            bias.copy_(expert.router_bias.clamp(max=0))
        shared = [expert.router_row_H.to(self.router_EH), bias]
        if self.local(index) < 0:
            return shared
        w13_GH, w2_HP = torch.zeros_like(self.w13_LGH[0]), torch.zeros_like(self.w2_LHP[0])
        padded = w2_HP.shape[1]
        for start, whole_FH in ((0, expert.gate_proj_FH), (padded, expert.up_proj_FH)):
            shard = whole_FH.chunk(self.shards, 0)[self.shard]
            w13_GH[start : start + len(shard)].copy_(shard)
        shard = expert.down_proj_HF.chunk(self.shards, 1)[self.shard]
        w2_HP[:, : shard.shape[1]].copy_(shard)
        return [*shared, *self.pack(w13_GH, w2_HP)]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equality of bits, so that NaN equals NaN and 0 does not equal -0."""
    return one.dtype == other.dtype and torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
