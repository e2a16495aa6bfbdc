"""Expert slots of one layer on one rank as plain arrays: write a slot, read it back, clear it.

Nothing here knows vLLM, so that the same code runs in a worker and in a fault test. What a
kernel wants an expert to look like is the ``pack`` of its arrays; everything else is copying.

Legend: E expert slots, L slots that this rank holds, H hidden, F expert intermediate of the whole
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


Pack = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""[G, H] and [H, P] in plain layout → the same in the layout that the kernel reads."""


def plain(w13_GH: Tensor, w2_HP: Tensor) -> tuple[Tensor, Tensor]:
    """The layout of a checkpoint, which Triton kernels read as it is."""
    return w13_GH, w2_HP


@dataclass(frozen=True, slots=True)
class SlotArrays:
    """One layer's slots on one rank.

    Attributes:
        router_EH, bias_E: on every rank alike; more rows than slots may be there.
        w13_LGH, w2_LHP: this rank's shard, packed.
        local: slot → index into the packed arrays, or -1 where another rank holds the slot.
        shards, shard: into how many parts an expert's intermediate size is cut, and which is here.
        pack: the kernel's layout.
    """

    router_EH: Tensor
    bias_E: Tensor
    w13_LGH: Tensor
    w2_LHP: Tensor
    local: Callable[[int], int]
    pack: Pack = plain
    shards: int = 1
    shard: int = 0

    def write(self, slot: int, expert: ExpertLayer) -> None:
        """Copy ``expert`` into ``slot`` and read it back.

        Raises:
            ReadBackError: the slot does not hold what was written, bit for bit.
        """
        for part, value in zip(self._parts(slot), self._resident(slot, expert), strict=True):
            part.copy_(value)
            if not same_bits(part, value):
                raise ReadBackError(f"slot {slot} does not hold what was written into it")

    def clear(self, slot: int) -> None:
        """Zero ``slot`` and read it back.

        Raises:
            ReadBackError: a bit of it is not zero.
        """
        for part in self._parts(slot):
            part.zero_()
            if _bytes(part).any():
                raise ReadBackError(f"slot {slot} is not zero after it was cleared")

    def digest(self, slot: int) -> bytes:
        """SHA-256 over what is resident in ``slot`` here."""
        hasher = hashlib.sha256()
        for part in self._parts(slot):
            hasher.update(_bytes(part).cpu().numpy().data)
        return hasher.digest()

    def _parts(self, slot: int) -> list[Tensor]:
        parts = [self.router_EH[slot], self.bias_E[slot : slot + 1]]
        index = self.local(slot)
        return parts if index < 0 else [*parts, self.w13_LGH[index], self.w2_LHP[index]]

    def _resident(self, slot: int, expert: ExpertLayer) -> Sequence[Tensor]:
        """``expert`` as :meth:`_parts` should hold it; the bias can only lower a logit."""
        bias = self.bias_E.new_zeros(1)
        if expert.router_bias is not None:
            bias.copy_(expert.router_bias.clamp(max=0))
        shared = [expert.router_row_H.to(self.router_EH), bias]
        if self.local(slot) < 0:
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
