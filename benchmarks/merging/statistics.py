"""Means over seeds with 95 % confidence intervals (Student's t)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Final

T_975: Final = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5 % quantile of Student's t for 1 to 9 degrees of freedom."""


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, interval and the values; one value has no interval."""
    mean = statistics.fmean(values)
    low_high = None
    if len(values) > 1:
        half = T_975[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
        low_high = [round(mean - half, 5), round(mean + half, 5)]
    return {"mean": round(mean, 5), "ci95": low_high, "by_seed": [round(value, 5) for value in values]}


def difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """``summary`` of ours less theirs, seed by seed."""
    return summary([one - other for one, other in zip(ours, theirs, strict=True)])
