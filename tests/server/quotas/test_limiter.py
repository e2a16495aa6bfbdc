"""Limits of projects and keys, with a clock that the test moves."""

from __future__ import annotations

from typing import Any

import pytest

from flexgate.policies.errors import StoreUnavailable
from flexgate.policies.store import Store, budgets
from flexgate.policies.tenants import Quota
from flexgate.server.errors import ApiError
from flexgate.server.quotas.limiter import Limiter, Subject
from flexgate.server.quotas.refusals import duration
from flexgate.server.quotas.spending import Spending


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def spending(real_store: Store) -> Spending:
    spending = Spending(real_store)
    spending.refresh()
    return spending


@pytest.fixture
def limiter(spending: Spending, clock: Clock) -> Limiter:
    return Limiter(spending, clock=clock)


def subject(id_: str = "t", **quota: int) -> Subject:
    return Subject(id_, "This project", Quota(**quota))


def refused(limiter: Limiter, *subjects: Subject, reserve: int = 0) -> ApiError:
    with pytest.raises(ApiError) as caught:
        limiter.admit(subjects, reserve)
    return caught.value


def test_without_limits_nothing_is_counted_or_told(limiter: Limiter) -> None:
    hold = limiter.admit([subject()], 10**9)
    assert hold.headers == {}
    hold.settle(5)


def test_requests_per_minute(limiter: Limiter, clock: Clock) -> None:
    t = subject(requests_per_minute=2)
    first = limiter.admit([t], 0)
    assert first.headers == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "1m0s",
    }
    clock.now += 10
    limiter.admit([t], 0).settle(0)
    first.settle(0)
    error = refused(limiter, t)
    assert (error.status, error.code, error.type) == (429, "rate_limit_exceeded", "requests")
    assert str(error) == (
        "This project may make 2 requests per minute. "
        "Trying again in 50s, or an administrator raising the limit, would change this."
    )
    assert error.headers["retry-after"] == "50"
    assert error.headers["x-ratelimit-remaining-requests"] == "0"
    clock.now += 50
    limiter.admit([t], 0)
    refused(limiter, t)


def test_tokens_per_minute_are_reserved_and_settled(limiter: Limiter, clock: Clock) -> None:
    t = subject(tokens_per_minute=100)
    first = limiter.admit([t], 80)
    assert first.headers["x-ratelimit-remaining-tokens"] == "20"
    assert refused(limiter, t, reserve=30).type == "tokens"
    first.settle(10)
    second = limiter.admit([t], 30)
    second.settle(90)  # its prompt was not part of what it asked for
    error = refused(limiter, t)
    assert error.headers["x-ratelimit-remaining-tokens"] == "0"
    clock.now += 60
    limiter.admit([t], 100)


def test_a_request_that_never_fits_is_not_told_to_try_again(limiter: Limiter) -> None:
    error = refused(limiter, subject(tokens_per_minute=100), reserve=101)
    assert "retry-after" not in error.headers
    assert "A smaller request" in str(error)
    assert "retry-after" not in refused(limiter, subject(requests_per_minute=0)).headers


def test_requests_at_once(limiter: Limiter) -> None:
    t = subject(concurrent_requests=1)
    running = limiter.admit([t], 0)
    assert refused(limiter, t).code == "rate_limit_exceeded"
    running.settle(0)
    running.settle(0)
    again = limiter.admit([t], 0)
    refused(limiter, t)
    again.settle(0)


def test_a_key_and_its_project_limit_together_and_a_refusal_counts_nowhere(limiter: Limiter) -> None:
    project, key, other = (
        subject("t", requests_per_minute=3),
        subject("k1", requests_per_minute=1),
        subject("k2", requests_per_minute=5),
    )
    hold = limiter.admit([project, key], 0)
    assert hold.headers["x-ratelimit-limit-requests"] == "1"
    for _ in range(5):
        refused(limiter, project, key)
    limiter.admit([project, other], 0)
    limiter.admit([project, other], 0)
    refused(limiter, project, other)


def test_a_limit_that_changes_holds_at_once(limiter: Limiter) -> None:
    limiter.admit([subject(requests_per_minute=10)], 0)
    limiter.admit([subject(requests_per_minute=10)], 0)
    refused(limiter, subject(requests_per_minute=2))
    limiter.admit([subject(requests_per_minute=3)], 0)


def test_a_budget_is_for_good(limiter: Limiter, spending: Spending, clock: Clock, real_store: Store) -> None:
    t = subject(total_tokens=100)
    running = limiter.admit([t], 60)
    error = refused(limiter, t, reserve=50)
    assert (error.status, error.code, error.type) == (429, "insufficient_quota", "insufficient_quota")
    assert "raising the budget" in str(error)
    running.settle(70)
    clock.now += 3600
    spending.refresh()
    assert budgets.read_use(real_store.engine) == {"t": 70}
    limiter.admit([t], 30).settle(30)
    assert refused(limiter, t).code == "insufficient_quota"
    limiter.admit([subject(total_tokens=101)], 1).settle(1)


def test_budgets_are_shared_by_processes_and_survive_restarts(real_store: Store) -> None:
    here, there = Spending(real_store), Spending(real_store)
    here.refresh()
    here.add("t", 40)
    here.refresh()
    there.refresh()
    there.add("t", 2)
    assert there.spent("t") == 42
    there.close()
    here.refresh()
    assert here.spent("t") == 42


def test_used_tokens_are_not_lost_while_the_store_is_away(spending: Spending, monkeypatch: Any) -> None:
    def broken(*_: object) -> None:
        raise StoreUnavailable("away")

    spending.add("t", 5)
    monkeypatch.setattr(budgets, "add_use", broken)
    with pytest.raises(StoreUnavailable):
        spending.refresh()
    spending.add("t", 2)
    assert spending.spent("t") == 7
    monkeypatch.undo()
    spending.refresh()
    assert spending.spent("t") == 7


def test_used_tokens_are_written_once_though_they_cannot_be_read_back(
    real_store: Store, spending: Spending, monkeypatch: Any
) -> None:
    def broken(*_: object) -> None:
        raise StoreUnavailable("away")

    spending.add("t", 10)
    monkeypatch.setattr(budgets, "read_use", broken)
    with pytest.raises(StoreUnavailable):
        spending.refresh()
    spending.add("t", 5)
    assert spending.spent("t") == 15
    monkeypatch.undo()
    spending.refresh()
    assert spending.spent("t") == 15
    assert budgets.read_use(real_store.engine) == {"t": 15}


def test_a_budget_that_is_not_known_is_not_spent(real_store: Store) -> None:
    limiter = Limiter(Spending(real_store))
    assert refused(limiter, subject(total_tokens=100)).status == 503
    limiter.admit([subject(requests_per_minute=1)], 0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0ms"), (0.0171, "18ms"), (0.9995, "1s"), (20.0, "20s"), (60.0, "1m0s"), (359.2, "6m0s")],
)
def test_durations_read_as_openais(seconds: float, text: str) -> None:
    assert duration(seconds) == text
