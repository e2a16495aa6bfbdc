"""No minute, wherever it begins, holds more than the limit, and a busy scope costs what a quiet one does."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgate.server.inference.limits.counters import BUCKETS, MINUTE_S, SlidingWindow

STEPS = st.lists(st.tuples(st.floats(0, 45) | st.floats(0, 0.4), st.integers(1, 6)), max_size=60)
GRAIN_S = MINUTE_S / BUCKETS


@given(STEPS, st.integers(1, 12))
def test_no_minute_holds_more_than_the_limit(steps: list[tuple[float, int]], limit: int) -> None:
    window, now, reserved = SlidingWindow(), 0.0, []
    for passed, amount in steps:
        now += passed
        if window.wait(limit, amount, now) == 0:
            window.reserve(amount, now)
            reserved.append((now, amount))
    for end, _ in reserved:
        assert sum(a for at, a in reserved if end - MINUTE_S < at <= end) <= limit


@given(STEPS, st.integers(1, 12))
def test_a_use_counts_for_a_minute_and_half_a_second_at_most(steps: list[tuple[float, int]], limit: int) -> None:
    window, now, reserved = SlidingWindow(), 0.0, []
    for passed, amount in steps:
        now += passed
        possible = sum(a for at, a in reserved if at > now - MINUTE_S - GRAIN_S)
        if window.wait(limit, amount, now) == 0:
            window.reserve(amount, now)
            reserved.append((now, amount))
        else:
            assert possible + amount > limit


@given(STEPS, st.integers(1, 12))
def test_waiting_as_long_as_was_said_is_enough_and_less_is_not(steps: list[tuple[float, int]], limit: int) -> None:
    window, now = SlidingWindow(), 0.0
    for passed, amount in steps:
        now += passed
        wait = window.wait(limit, amount, now)
        if wait == math.inf:
            assert amount > limit
            continue
        if wait > 1e-6:
            assert window.wait(limit, amount, now + wait - 1e-6) > 0
        if wait > 0:
            now += wait + 1e-9
        assert window.wait(limit, amount, now) == 0
        window.reserve(amount, now)


def test_uses_that_are_rarer_than_the_grain_end_exactly() -> None:
    window = SlidingWindow()
    for second in range(10):
        window.reserve(1, float(second))
    assert window.wait(10, 1, 59.0) == 1.0
    assert window.used(60.0) == 9
    assert window.reset(60.0) == 9.0


def test_uses_that_are_counted_together_end_with_the_newest_of_them() -> None:
    window = SlidingWindow()
    window.reserve(1, 0.0)
    window.reserve(1, 0.25)
    assert window.used(60.125) == 2
    assert window.used(60.25) == 0


def test_what_was_not_used_is_given_back() -> None:
    window = SlidingWindow()
    part = window.reserve(100, 0.0)
    window.commit(part, 30, 5.0)
    assert window.used(5.0) == 30
    late = window.reserve(100, 6.0)
    assert window.used(60.0) == 100
    window.commit(late, 10, 67.0)
    assert window.used(67.0) == 0


def test_what_was_used_beyond_the_reservation_counts_from_its_commit() -> None:
    window = SlidingWindow()
    part = window.reserve(10, 0.0)
    window.commit(part, 25, 30.0)
    assert (window.used(30.0), window.used(60.0), window.used(90.0)) == (25, 15, 0)


def test_memory_does_not_grow_with_use() -> None:
    window = SlidingWindow()
    for tick in range(100_000):
        window.reserve(1, tick / 500)
    assert len(window) <= BUCKETS + 1


def operations(work: Callable[[], Any]) -> int:
    """Lines of Python that `work` executes."""
    count = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("method", ["reserved", "refused", "committed", "reset"])
def test_the_work_of_a_request_does_not_grow_with_the_uses_of_the_last_minute(method: str) -> None:
    costs = []
    for uses in (60, 600, 6_000, 60_000):
        window = SlidingWindow()
        for number in range(uses):
            part = window.reserve(1, number * 59.0 / uses)
        work = {
            "reserved": lambda window=window: (window.wait(10**9, 1, 59.0), window.reserve(1, 59.0)),
            "refused": lambda window=window, uses=uses: window.wait(uses, uses, 59.0),
            "committed": lambda window=window, part=part: window.commit(part, 0, 59.0),
            "reset": lambda window=window: (window.used(59.0), window.reset(59.0)),
        }[method]
        costs.append(operations(work))
    assert costs[-1] <= max(2 * costs[1], 4 * BUCKETS), costs
    assert costs[-1] <= 1.1 * costs[-2], costs
