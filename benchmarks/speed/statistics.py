"""Ratios whose intervals hold over starts: several starts per contender, several rounds within each.

Two starts of one program differ by a few percent for as long as they live (memory layout, placement), so that rounds
within one start, however many, say nothing of the next one. The unit of measurement is therefore a start. Contenders
start side by side and take turns; a round gives one ratio, the median over a start's rounds is the start's ratio, and
the geometric mean over starts is the result.

The bootstrap follows the nesting: starts are drawn with replacement, and a start that is drawn brings its rounds along
as they are. Drawing rounds anew within it as well would count their scatter twice, since it is already in how the
starts' medians differ (Davison and Hinkley, Bootstrap Methods, 1997, 3.8); that covered a known ratio 98 to 100 times
in 100 instead of 95. A bootstrap of few starts is too narrow, and is widened as Student's t is against the normal
distribution (Hesterberg, The American Statistician 69, 2015).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95
NORMAL = 1.96  # quantile of the normal distribution that leaves 2.5 % above
# The same quantile of Student's t for 1, 2, … degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
ALLOWED = 0.01  # how far from 1 the interval of a contender against itself may reach, where bounds lie near 1

Starts = Sequence[Sequence[float]]  # of each start its rounds
Logs = Sequence[NDArray[np.float64]]


@dataclass(frozen=True)
class Ratio:
    """A ratio with its 95 % interval; the interval is without bound where one start cannot tell."""

    value: float
    low: float
    high: float
    starts: int
    rounds: int

    def farthest(self) -> float:
        """How far from 1 the interval reaches."""
        return max(abs(self.low - 1), abs(self.high - 1))

    def report(self) -> dict[str, Any]:
        """The ratio as result files have it; null is an end without bound."""
        ends = [_rounded(end) if math.isfinite(end) and end > 0 else None for end in (self.low, self.high)]
        return {"median": _rounded(self.value), "ci95": ends, "starts": self.starts, "rounds": self.rounds}


def paired(ours: Starts, theirs: Starts, *, seed: int = 0) -> Ratio:
    """`ours / theirs` where start by start, round by round, the two took turns.

    Raises:
        ValueError: the shapes differ, nothing was measured, or a value is not positive.
    """
    if [len(start) for start in ours] != [len(start) for start in theirs]:
        raise ValueError("paired contenders need the same starts with the same rounds")
    rounds = [mine - other for mine, other in zip(_logs(ours), _logs(theirs), strict=True)]
    return _over_starts(_medians(rounds), sum(map(len, rounds)), seed)


def pooled_quantile(
    ours: Sequence[Sequence[Sequence[float]]], theirs: Sequence[Sequence[Sequence[float]]], q: float, *, seed: int = 0
) -> Ratio:
    """`ours / theirs` of a quantile over all values of a start's rounds, such as latencies of single requests.

    Raises:
        ValueError: nothing was measured, or a value is not positive.
    """
    pooled = [_logs([np.concatenate(start).tolist() for start in starts]) for starts in (ours, theirs)]
    mine, other = (np.array([np.quantile(start, q) for start in starts]) for starts in pooled)
    return _over_starts(mine - other, sum(map(len, ours)), seed)


def reasons(itself: Sequence[tuple[str, Ratio]], allowed: float = ALLOWED) -> list[str]:
    """Why a result must not be published: where a contender against itself is not within `allowed` of 1.

    The whole interval counts, not its middle: a benchmark whose noise reaches 3 % cannot tell 0.99 from 1, even
    where its own contender happens to come out at 1.000.
    """
    return [
        f"{name}: the baseline against itself is {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}], "
        f"and may be at most {allowed:.0%} from 1; measure more starts, or on a quieter machine"
        for name, ratio in itself
        if not ratio.farthest() <= allowed
    ]


def _logs(starts: Starts) -> Logs:
    logs = []
    for start in starts:
        values = np.asarray(start, dtype=float)
        if values.size == 0 or not (np.isfinite(values).all() and (values > 0).all()):
            raise ValueError("every start needs rounds, and every value must be positive")
        logs.append(np.log(values))
    if not logs:
        raise ValueError("nothing was measured")
    return logs


def _medians(rounds: Logs) -> NDArray[np.float64]:
    return np.array([np.median(start) for start in rounds])


def _resampled(starts: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """Means over starts drawn with replacement, each with all of its rounds."""
    means: NDArray[np.float64] = generator.choice(starts, (RESAMPLES, len(starts))).mean(axis=1)
    return means


def _over_starts(starts: NDArray[np.float64], rounds: int, seed: int) -> Ratio:
    """The mean of logarithms, and their percentile interval, stretched around it for the number of starts."""
    point, count = float(np.mean(starts)), len(starts)
    if count < 2:
        return Ratio(math.exp(point), 0.0, math.inf, count, rounds)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(_resampled(starts, np.random.default_rng(seed)), [tail, 1 - tail])
    stretch = _student(count - 1) / NORMAL * math.sqrt(count / (count - 1))
    ends = (point + stretch * (end - point) for end in (low, high))
    return Ratio(math.exp(point), *(_exponential(end) for end in ends), count, rounds)


def _student(freedom: int) -> float:
    return STUDENT[freedom - 1] if freedom <= len(STUDENT) else NORMAL + 2.5 / freedom


def _exponential(value: float) -> float:
    return math.exp(min(value, 700.0))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
