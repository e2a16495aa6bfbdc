"""No minute, wherever it begins, holds more than the limit."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from flexgate.server.quotas.window import MINUTE_S, Window

STEPS = st.lists(st.tuples(st.floats(0, 45), st.integers(1, 6)), max_size=40)


@given(STEPS, st.integers(1, 12))
def test_no_minute_holds_more_than_the_limit(steps: list[tuple[float, int]], limit: int) -> None:
    window, now, admitted = Window(), 0.0, []
    for passed, amount in steps:
        now += passed
        if window.wait(limit, amount, now) == 0:
            window.add(now, amount)
            admitted.append((now, amount))
    for end, _ in admitted:
        assert sum(a for at, a in admitted if end - MINUTE_S < at <= end) <= limit


@given(STEPS, st.integers(1, 12))
def test_waiting_as_long_as_was_said_is_enough_and_less_is_not(steps: list[tuple[float, int]], limit: int) -> None:
    window, now = Window(), 0.0
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
        window.add(now, amount)


def test_what_was_not_used_is_given_back() -> None:
    window = Window()
    use = window.add(0.0, 100)
    window.shrink(use, 30, 5.0)
    assert window.used(5.0) == 30
    window.shrink(use, 60, 6.0)
    assert window.used(6.0) == 30
    assert window.used(60.0) == 0
    window.shrink(use, 10, 61.0)
    assert window.used(61.0) == 0


def test_old_uses_are_forgotten() -> None:
    window = Window()
    for second in range(1000):
        window.add(float(second), 1)
        window.used(float(second))
    assert len(window) == 60
