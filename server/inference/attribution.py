"""Shares of one answer in whole parts per million that sum to exactly one million."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Final

PPM: Final = 1_000_000


def share_ppm(masses: Sequence[float]) -> list[int]:
    """Each mass as its share of the total, by largest remainder, ties to the earlier.

    All zero when the total is zero. A mass of zero always has a share of zero.

    Raises:
        ValueError: a mass is negative, infinite or not a number.
    """
    if any(not math.isfinite(mass) or mass < 0 for mass in masses):
        raise ValueError("gate masses must be finite and not negative")
    exact = [Fraction(mass) for mass in masses]
    total = sum(exact)
    if total == 0:
        return [0] * len(exact)
    ideal = [mass * PPM / total for mass in exact]
    shares = [int(share) for share in ideal]
    by_remainder = sorted(range(len(ideal)), key=lambda i: (shares[i] - ideal[i], i))
    for i in by_remainder[: PPM - sum(shares)]:
        shares[i] += 1
    return shares
