"""The experts of one layer on one rank as plain arrays: write a slot's, read it back, clear it.

Nothing here knows vLLM, so that the same code runs in a worker and in a fault test. What a
kernel wants an expert to look like is the ``pack`` of its arrays; everything else is copying.

Low-rank experts come last. They hold factors, padded with zeros to the rank that there is room for.

Legend: E experts of the layer, L experts that this process holds, H hidden, F expert intermediate of the whole
expert, P the same of this process's shard with the kernel's padding, G = 2P; R rank of a slot, Q = 2R.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexgate.experts.package.weights import ExpertLayer, LowRankLayer
from flexgate.kernels.gated_experts import LowRankExperts


class ReadBackError(RuntimeError):
    """Memory does not hold what was written into it."""


class SlotShapeError(RuntimeError):
    """A slot has not the experts that are to be written into it."""


Pack = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""[G, H] and [H, P] in plain layout → the same in the layout that the kernel reads."""


def plain(w13_GH: Tensor, w2_HP: Tensor) -> tuple[Tensor, Tensor]:
    """The layout of a checkpoint, which Triton kernels read as it is."""
    return w13_GH, w2_HP


def low_rank_experts(ranks: Sequence[int], w2_EHF: Tensor) -> tuple[LowRankExperts, ...]:
    """Zeros for experts of ``ranks``, as of a layer with these full ones; neighbours of one rank share arrays."""
    _, hidden, intermediate = w2_EHF.shape
    groups = []
    for rank, run in groupby(ranks):
        slots = len(list(run))
        shapes = (
            (slots, 2 * rank, hidden),
            (slots, 2 * intermediate, rank),
            (slots, rank, intermediate),
            (slots, hidden, rank),
        )
        groups.append(LowRankExperts(*(w2_EHF.new_zeros(shape) for shape in shapes)))
    return tuple(groups)


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
        factors: of each of the last experts, which have a rank: [Q, H], [G, R], [R, F] and [H, R].
    """

    unit_E: bytes
    router_EH: Tensor
    bias_E: Tensor
    w13_LGH: Tensor
    w2_LHP: Tensor
    local: Callable[[int], int]
    pack: Pack = plain
    factors: Sequence[tuple[Tensor, ...]] = ()
    shards: int = 1
    shard: int = 0

    def only_expert(self, slot: int) -> int:
        """The expert that ``slot`` is made of here; raises `SlotShapeError` unless there is exactly one."""
        experts = self._experts(slot)
        if len(experts) != 1:
            raise SlotShapeError(f"slot {slot} has {len(experts)} experts in a layer; a package has one")
        return experts[0]

    def require_size(self, slot: int, rank: int | None) -> None:
        """Refuse a low-rank expert (None: a full one) that ``slot`` has no room for; raises `SlotShapeError`."""
        factors = self._factors(self.only_expert(slot))
        room = None if factors is None else factors[-1].shape[1]
        if (rank is None) != (room is None):
            held, given = ("full" if value is None else f"of rank {value}" for value in (room, rank))
            raise SlotShapeError(f"slot {slot} is {held}; the expert is {given}")
        if rank is not None and room is not None and rank > room:
            raise SlotShapeError(f"slot {slot} has room for rank {room}; the expert is of rank {rank}")

    def write(self, slot: int, expert: ExpertLayer | LowRankLayer) -> None:
        """Copy ``expert`` into ``slot`` and read it back.

        Raises:
            SlotShapeError: the slot has not one expert of this size in this layer; nothing was written.
            ReadBackError: the slot does not hold what was written, bit for bit.
        """
        self.require_size(slot, expert.rank if isinstance(expert, LowRankLayer) else None)
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
            factors = self._factors(expert)
            if factors is not None:
                parts += factors
            elif (index := self.local(expert)) >= 0:
                parts += [self.w13_LGH[index], self.w2_LHP[index]]
        return parts

    def _factors(self, expert: int) -> tuple[Tensor, ...] | None:
        """Where a low-rank expert lies; None for a full one."""
        place = expert - (len(self.unit_E) - len(self.factors))
        return self.factors[place] if place >= 0 else None

    def _resident(self, index: int, expert: ExpertLayer | LowRankLayer) -> Sequence[Tensor]:
        """``expert`` as :meth:`_parts` should hold it; the bias can only lower a logit."""
        bias = self.bias_E.new_zeros(1)
        if expert.router_bias is not None:
            bias.copy_(expert.router_bias.clamp(max=0))
        shared = [expert.router_row_H.to(self.router_EH), bias]
        factors = self._factors(index)
        if factors is not None and isinstance(expert, LowRankLayer):
            return [*shared, *(value.to(factors[0]) for value in _padded(expert, factors[-1].shape[1]))]
        assert isinstance(expert, ExpertLayer)
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


def _padded(expert: LowRankLayer, rank: int) -> tuple[Tensor, ...]:
    """The factors as a slot of ``rank`` holds them; a product with zeros adds nothing."""
    missing = rank - expert.rank
    a = [pad(one.a_RI, (0, 0, 0, missing)) for one in expert.factors]
    b = [pad(one.b_OR, (0, missing)) for one in expert.factors]
    return torch.cat(a[:2]), torch.cat(b[:2]), a[2], b[2]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equality of bits, so that NaN equals NaN and 0 does not equal -0."""
    return one.dtype == other.dtype and torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
