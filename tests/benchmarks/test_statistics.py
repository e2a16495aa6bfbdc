"""Intervals hold over starts: on synthetic data whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from speed import statistics
from speed.statistics import ALLOWED, Ratio, paired, pooled_quantile, reasons

TRUTH = 0.97
TRIALS = 150


def measured(
    generator: np.random.Generator, level: float, starts: int, rounds: int, between: float
) -> list[list[float]]:
    """Starts that differ by `between` for as long as they live, with rounds that scatter by 3 %."""
    offsets = generator.normal(0, between, (starts, 1))
    noise = generator.normal(0, 0.03, (starts, rounds))
    return (level * np.exp(offsets + noise)).tolist()


def coverage(starts: int, between: float, seed: int) -> float:
    generator = np.random.default_rng(seed)
    hits = 0
    for _ in range(TRIALS):
        ours = measured(generator, TRUTH, starts, 15, between)
        theirs = measured(generator, 1.0, starts, 15, between)
        found = paired(ours, theirs)
        hits += found.low <= TRUTH <= found.high
    return hits / TRIALS


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 400)


@pytest.mark.parametrize("starts", [3, 5, 8])
@pytest.mark.parametrize("between", [0.0, 0.02])
def test_an_interval_over_several_starts_covers_the_truth_19_times_in_20(starts: int, between: float) -> None:
    assert 0.9 <= coverage(starts, between, seed=starts) <= 0.99


def test_an_interval_over_the_rounds_of_one_start_does_not() -> None:
    generator, hits = np.random.default_rng(1), 0
    for _ in range(TRIALS):
        (ours,), (theirs,) = (measured(generator, level, 1, 75, 0.02) for level in (TRUTH, 1.0))
        drawn = generator.choice(np.asarray(ours) / np.asarray(theirs), (400, 75))
        low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
        hits += low <= TRUTH <= high
    assert hits / TRIALS < 0.5


def test_more_starts_narrow_the_interval_and_more_rounds_of_the_same_starts_do_not_much() -> None:
    generator = np.random.default_rng(2)

    def width(starts: int, rounds: int) -> float:
        widths = []
        for _ in range(20):
            found = paired(*(measured(generator, 1.0, starts, rounds, 0.03) for _ in range(2)))
            widths.append(found.high - found.low)
        return float(np.median(widths))

    assert width(12, 10) < 0.6 * width(4, 10)
    assert width(4, 120) > 0.6 * width(4, 10)


def test_drift_that_both_contenders_suffer_cancels_within_a_round() -> None:
    drift = [[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]
    found = paired([[0.9 * value for value in start] for start in drift], drift)
    assert (found.value, found.low, found.high) == pytest.approx((0.9, 0.9, 0.9))


def test_a_pooled_quantile_weighs_every_request_alike() -> None:
    slow, fast = [[[2.0] * 9 + [20.0]]] * 3, [[[1.0] * 9 + [10.0]]] * 3
    found = pooled_quantile(slow, fast, 0.5)
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))


def test_one_start_gives_a_ratio_without_bounds() -> None:
    found = paired([[1.0, 1.1, 1.2]], [[1.0, 1.0, 1.0]])
    assert found.report()["ci95"] == [None, None]
    assert math.isinf(found.farthest())


def test_a_baseline_that_is_not_itself_must_not_be_published() -> None:
    narrow, shifted = Ratio(1.0, 0.995, 1.005, 5, 50), Ratio(1.012, 1.005, 1.02, 5, 50)
    wide, single = Ratio(1.0, 0.96, 1.04, 5, 50), Ratio(1.0, 0.0, math.inf, 1, 50)
    refused = reasons([("narrow", narrow), ("shifted", shifted), ("wide", wide), ("single", single)])
    assert [reason.partition(":")[0] for reason in refused] == ["shifted", "wide", "single"]
    assert narrow.farthest() <= ALLOWED


def test_the_same_measurements_give_the_same_interval() -> None:
    ours, theirs = (measured(np.random.default_rng(seed), 1.0, 4, 6, 0.02) for seed in (1, 2))
    assert paired(ours, theirs) == paired(ours, theirs)


@pytest.mark.parametrize(
    ("ours", "theirs"), [([], []), ([[]], [[]]), ([[1.0]], [[0.0]]), ([[1.0, 2.0]], [[1.0]]), ([[math.nan]], [[1.0]])]
)
def test_what_was_not_measured_is_refused(ours: list[list[float]], theirs: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"need|measured"):
        paired(ours, theirs)
