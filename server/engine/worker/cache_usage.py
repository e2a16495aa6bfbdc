"""What the positions of the KV cache were routed to, for requests that read them from there.

A request may begin with positions that another one of the same tenant and gate computed: the salt of the prefix cache
names both. Their experts took part in its response as well. Each pass writes down what it routed, over whatever stood
there, so that a position that is computed again counts once, and one whose block was given away is written before it
can be read.

Legend: P positions of the KV cache, U slots of units.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flexgate.server.engine.protocol.usage import Int64Array

Used = tuple[Int64Array, Int64Array]
"""Routed mass, [n, U], and chosen units as bits, [n], of some positions."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """Routed mass and chosen units of each position of the cache, as `GateState` has them of each token."""

    block_size: int
    mass_PU: torch.Tensor
    chosen_P: torch.Tensor

    @classmethod
    def of(cls, blocks: int, block_size: int, units: int, device: torch.device) -> "Remembered":
        """For a cache of so many blocks; 8 bytes a position for each unit, and 8."""
        positions = blocks * block_size
        mass_PU = torch.zeros(positions, units, dtype=torch.int64, device=device)
        return cls(block_size, mass_PU, torch.zeros(positions, dtype=torch.int64, device=device))

    def arrays(self) -> Used:
        """The same memory for NumPy; on CPU."""
        return self.mass_PU.numpy(), self.chosen_P.numpy()

    def places(self, blocks: Sequence[list[int]], first: int, end: int) -> Int64Array:
        """Where positions ``first`` to ``end`` of a request lie, which has these blocks of each cache group."""
        (ids,) = blocks
        positions = np.arange(first, end)
        return np.asarray(ids, np.int64)[positions // self.block_size] * self.block_size + positions % self.block_size
