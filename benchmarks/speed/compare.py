"""Interleaved measurements, and figures that are not ratios; ratios and their intervals are `speed.statistics`'.

On a shared machine a speed says little and drifts; neighbours in time suffer the same noise, so contenders take turns.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def take_turns(
    contenders: Mapping[str, Callable[[], T]], rounds: int, tick: Callable[[], object] = lambda: None
) -> dict[str, list[T]]:
    """Measure every contender once a round, in an order that turns around from round to round."""
    measured: dict[str, list[T]] = {name: [] for name in contenders}
    for number in range(rounds):
        names = list(contenders)[:: 1 if number % 2 == 0 else -1]
        for name in names:
            measured[name].append(contenders[name]())
            tick()
    return measured


def quartiles(values: Any) -> list[float]:
    """The first and the third quartile."""
    return [_rounded(q) for q in np.quantile(values, [0.25, 0.75])]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of a figure that is not a ratio."""
    return {"median": _rounded(np.median(values)), "quartiles": quartiles(values)}


def _rounded(value: Any) -> float:
    return float(f"{float(value):.4g}")
