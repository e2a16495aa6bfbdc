"""Shares of the experts in a request, in whole parts per million."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

PPM: Final = 1_000_000


def share_ppm(masses: Sequence[int]) -> list[int]:
    """Each mass as its share of the total, by largest remainder, ties to the earlier.

    All zero when the total is zero. A mass of zero always has a share of zero.

    Raises:
        ValueError: a mass is negative.
    """
    if min(masses, default=0) < 0:
        raise ValueError("gate masses must not be negative")
    total = sum(masses)
    if not total:
        return [0] * len(masses)
    shares = [mass * PPM // total for mass in masses]
    if left := PPM - sum(shares):
        remainders = [mass * PPM % total for mass in masses]
        for i in sorted(range(len(masses)), key=remainders.__getitem__, reverse=True)[:left]:
            shares[i] += 1
    return shares
