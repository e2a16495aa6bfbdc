"""Ratios of interleaved measurements, with what is needed to judge them.

On a shared machine a speed says little and drifts; neighbours in time suffer the same noise. So the
contenders take turns, every turn gives one ratio, and the median of those ratios is reported with a
bootstrap interval of that median.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
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


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Median of ``ours / theirs`` per round, its 95 % interval, and the quartiles of the rounds."""
    rounds = np.asarray(ours) / np.asarray(theirs)
    return {"median": _rounded(np.median(rounds)), "ci95": median_interval(rounds), "quartiles": quartiles(rounds)}


def median_interval(values: Any) -> list[float]:
    """A percentile bootstrap of the median; seeded, so that a file can be recomputed."""
    generator = np.random.default_rng(0)
    drawn = generator.choice(values, (RESAMPLES, len(values)))
    tail = (1 - CONFIDENCE) / 2
    return [_rounded(q) for q in np.quantile(np.median(drawn, axis=1), [tail, 1 - tail])]


def quartiles(values: Any) -> list[float]:
    """The first and the third quartile."""
    return [_rounded(q) for q in np.quantile(values, [0.25, 0.75])]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of a figure that is not a ratio."""
    return {"median": _rounded(np.median(values)), "quartiles": quartiles(values)}


def _rounded(value: Any) -> float:
    return float(f"{float(value):.4g}")


def pooled_quantile_ratio(
    over: Sequence[Sequence[float]], under: Sequence[Sequence[float]], q: float
) -> dict[str, Any]:
    """A quantile of all rounds' values in ``over`` divided by that of ``under``; rounds are resampled in pairs."""
    rounds = [(np.asarray(a), np.asarray(b)) for a, b in zip(over, under, strict=True)]

    def value(chosen: Any) -> float:
        return float(
            np.quantile(np.concatenate([rounds[i][0] for i in chosen]), q)
            / np.quantile(np.concatenate([rounds[i][1] for i in chosen]), q)
        )

    generator = np.random.default_rng(0)
    drawn = [value(generator.integers(0, len(rounds), len(rounds))) for _ in range(RESAMPLES)]
    tail = (1 - CONFIDENCE) / 2
    interval = [_rounded(q) for q in np.quantile(drawn, [tail, 1 - tail])]
    return {"ratio": _rounded(value(range(len(rounds)))), "ci95": interval}
