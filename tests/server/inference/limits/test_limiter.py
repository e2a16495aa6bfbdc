"""Limits of projects and keys, with a clock that the test moves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from clocks import Clock

from flexgate.policies.documents import Quota
from flexgate.policies.store import Store, budgets
from flexgate.server.http.errors import ApiError
from flexgate.server.inference.limits import budget_usage
from flexgate.server.inference.limits.budget_usage import BudgetUsage
from flexgate.server.inference.limits.counters import Counter, SlidingWindow
from flexgate.server.inference.limits.limiter import (
    KEPT_COUNTERS,
    REQUESTS,
    TOKENS,
    Limiter,
    LimitScope,
    Reservation,
    Rule,
)
from flexgate.server.inference.limits.refusals import duration, too_many_tokens


@pytest.fixture
def usage(real_store: Store) -> BudgetUsage:
    usage = BudgetUsage(real_store)
    usage.refresh()
    return usage


@pytest.fixture
def limiter(usage: BudgetUsage, clock: Clock) -> Limiter:
    return Limiter(usage, clock=clock, wall_clock=clock)


def scope(id_: str = "t", **quota: int) -> LimitScope:
    return LimitScope(id_, "This project", Quota(**quota))


def reserve(limiter: Limiter, *scopes: LimitScope, tokens: int = 0) -> Reservation:
    return limiter.reserve(scopes, {REQUESTS: 1, TOKENS: tokens})


def refused(limiter: Limiter, *scopes: LimitScope, tokens: int = 0) -> ApiError:
    with pytest.raises(ApiError) as caught:
        reserve(limiter, *scopes, tokens=tokens)
    return caught.value


def test_without_limits_nothing_is_counted_or_told(limiter: Limiter) -> None:
    held = reserve(limiter, scope(), tokens=10**9)
    assert held.headers == {}
    held.commit({TOKENS: 5})


def test_requests_per_minute(limiter: Limiter, clock: Clock) -> None:
    t = scope(requests_per_minute=2)
    first = reserve(limiter, t, tokens=0)
    assert first.headers == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "1m0s",
    }
    clock.now += 10
    reserve(limiter, t, tokens=0).commit({TOKENS: 0})
    first.commit({TOKENS: 0})
    error = refused(limiter, t)
    assert (error.status, error.code, error.type) == (429, "rate_limit_exceeded", "requests")
    assert str(error) == (
        "This project has reached its limit of 2 requests per minute. "
        "Try again in 50s, or ask an administrator to raise the limit."
    )
    assert error.headers["retry-after"] == "50"
    assert error.headers["x-ratelimit-remaining-requests"] == "0"
    clock.now += 50
    reserve(limiter, t, tokens=0)
    refused(limiter, t)


def test_tokens_per_minute_are_reserved_and_committed(limiter: Limiter, clock: Clock) -> None:
    t = scope(tokens_per_minute=100)
    first = reserve(limiter, t, tokens=80)
    assert first.headers["x-ratelimit-remaining-tokens"] == "20"
    assert refused(limiter, t, tokens=30).type == "tokens"
    first.commit({TOKENS: 10})
    second = reserve(limiter, t, tokens=30)
    second.commit({TOKENS: 90})  # its prompt was not part of what it asked for
    error = refused(limiter, t)
    assert error.headers["x-ratelimit-remaining-tokens"] == "0"
    clock.now += 60
    reserve(limiter, t, tokens=100)


def test_headers_count_what_a_request_has_reserved_and_then_what_it_used(limiter: Limiter) -> None:
    running = reserve(limiter, scope(tokens_per_minute=100))
    told = [running.headers["x-ratelimit-remaining-tokens"]]
    running.raise_to(tokens=60)
    told.append(running.headers["x-ratelimit-remaining-tokens"])
    running.commit({TOKENS: 10})
    told.append(running.headers["x-ratelimit-remaining-tokens"])
    assert told == ["100", "40", "90"]


def test_a_request_that_never_fits_is_not_told_to_try_again(limiter: Limiter) -> None:
    error = refused(limiter, scope(tokens_per_minute=100), tokens=101)
    assert "retry-after" not in error.headers
    assert "Send a smaller request" in str(error)
    assert "retry-after" not in refused(limiter, scope(requests_per_minute=0)).headers


def test_a_request_that_never_fits_with_what_it_has_reserved_is_not_told_to_try_again(limiter: Limiter) -> None:
    running = reserve(limiter, scope(tokens_per_minute=100), tokens=90)
    with pytest.raises(ApiError) as caught:
        running.raise_to(tokens=110)
    assert "retry-after" not in caught.value.headers


def test_requests_at_once(limiter: Limiter) -> None:
    t = scope(concurrent_requests=1)
    running = reserve(limiter, t, tokens=0)
    assert refused(limiter, t).code == "rate_limit_exceeded"
    running.commit({TOKENS: 0})
    running.commit({TOKENS: 0})
    again = reserve(limiter, t, tokens=0)
    refused(limiter, t)
    again.commit({TOKENS: 0})


def test_a_key_and_its_project_limit_together_and_a_refusal_counts_nowhere(limiter: Limiter) -> None:
    project, key, other = (
        scope("t", requests_per_minute=3),
        scope("k1", requests_per_minute=1),
        scope("k2", requests_per_minute=5),
    )
    held = reserve(limiter, project, key, tokens=0)
    assert held.headers["x-ratelimit-limit-requests"] == "1"
    for _ in range(5):
        refused(limiter, project, key)
    reserve(limiter, project, other, tokens=0)
    reserve(limiter, project, other, tokens=0)
    refused(limiter, project, other)


def test_a_limit_that_changes_holds_at_once(limiter: Limiter) -> None:
    reserve(limiter, scope(requests_per_minute=10), tokens=0)
    reserve(limiter, scope(requests_per_minute=10), tokens=0)
    refused(limiter, scope(requests_per_minute=2))
    reserve(limiter, scope(requests_per_minute=3), tokens=0)


def test_a_budget_is_for_good(limiter: Limiter, usage: BudgetUsage, clock: Clock, real_store: Store) -> None:
    t = scope(total_tokens=100)
    running = reserve(limiter, t, tokens=60)
    error = refused(limiter, t, tokens=50)
    assert (error.status, error.code, error.type) == (429, "insufficient_quota", "insufficient_quota")
    assert "to raise the budget" in str(error)
    running.commit({TOKENS: 70})
    clock.now += 3600
    usage.refresh()
    assert budgets.read_use(real_store.engine).used == {"t": 70}
    reserve(limiter, t, tokens=30).commit({TOKENS: 30})
    assert refused(limiter, t).code == "insufficient_quota"
    reserve(limiter, scope(total_tokens=101), tokens=1).commit({TOKENS: 1})


@pytest.mark.parametrize("field", ["total_tokens", "tokens_per_day", "tokens_per_month", "tokens_per_minute"])
def test_where_nothing_is_left_no_one_is_asked_to_lower_what_they_did_not_state(limiter: Limiter, field: str) -> None:
    t = scope(**{field: 100})
    reserve(limiter, t, tokens=100)
    message = str(refused(limiter, t))
    assert "to raise the" in message
    assert not [word for word in ("needs 0", "max_tokens", "smaller") if word in message]


@pytest.mark.parametrize("field", ["total_tokens", "tokens_per_day"])
def test_what_a_request_itself_has_reserved_is_not_what_others_use(limiter: Limiter, field: str) -> None:
    running = reserve(limiter, scope(**{field: 100}), tokens=100)
    with pytest.raises(ApiError, match=r": 0 are used or reserved, and this request needs 101\. Send less"):
        running.raise_to(tokens=101)


LAST_MINUTE = 1_793_491_200.0 - 60  # of October 2026, in UTC


@pytest.mark.parametrize(("field", "said"), [("tokens_per_day", "per day"), ("tokens_per_month", "per month")])
def test_a_budget_of_a_day_or_month_begins_anew_with_the_next_in_utc(
    limiter: Limiter, usage: BudgetUsage, clock: Clock, real_store: Store, field: str, said: str
) -> None:
    clock.now, t = LAST_MINUTE, scope(**{field: 100})
    reserve(limiter, t, tokens=60).commit({TOKENS: 70})
    error = refused(limiter, t, tokens=50)
    assert (error.status, error.code) == (429, "insufficient_quota")
    assert f"budget of 100 tokens {said}: 70 are used or reserved" in str(error)
    assert "in UTC, in 1m0s" in str(error)
    assert "begins" not in str(refused(limiter, t, tokens=101))
    clock.now += 60
    reserve(limiter, t, tokens=100).commit({TOKENS: 30})
    assert refused(limiter, t, tokens=71).code == "insufficient_quota"
    usage.refresh()
    name = "t@2026-11-01" if field == "tokens_per_day" else "t@2026-11"
    assert budgets.read_use(real_store.engine).used[name] == 30


def test_what_runs_while_a_day_ends_counts_in_the_next(limiter: Limiter, clock: Clock) -> None:
    clock.now, t = LAST_MINUTE, scope(tokens_per_day=100)
    running = reserve(limiter, t, tokens=60)
    clock.now += 60
    assert refused(limiter, t, tokens=50).status == 429
    running.commit({TOKENS: 10})
    reserve(limiter, t, tokens=90)
    assert refused(limiter, t, tokens=1).status == 429


def test_a_shorter_period_and_the_budget_for_good_hold_together(limiter: Limiter, clock: Clock) -> None:
    clock.now, t = LAST_MINUTE, scope(tokens_per_day=100, tokens_per_month=150, total_tokens=400)
    reserve(limiter, t, tokens=100).commit({TOKENS: 100})
    clock.now += 60
    reserve(limiter, t, tokens=100).commit({TOKENS: 100})
    clock.now += 86_400
    assert "per month" in str(refused(limiter, t, tokens=60))
    reserve(limiter, t, tokens=50).commit({TOKENS: 50})
    assert "nothing left of its budget of 150 tokens per month" in str(refused(limiter, t, tokens=1))


@pytest.mark.parametrize("field", ["total_tokens", "tokens_per_day", "tokens_per_month"])
def test_what_runs_on_one_server_is_reserved_on_all(real_store: Store, clock: Clock, field: str) -> None:
    here, there = BudgetUsage(real_store, clock=clock), BudgetUsage(real_store, clock=clock)
    one, other = (Limiter(usage, clock=clock, wall_clock=clock) for usage in (here, there))
    here.refresh()
    there.refresh()
    t = scope(**{field: 100})
    running = reserve(one, t, tokens=100)
    here.refresh()
    there.refresh()
    assert "has nothing left of its budget of 100 tokens" in str(refused(other, t))
    running.commit({TOKENS: 30})
    here.refresh()
    there.refresh()
    assert refused(other, t, tokens=71).code == "insufficient_quota"
    reserve(other, t, tokens=70)
    assert budgets.read_use(real_store.engine).elsewhere.total() == 0


@pytest.mark.asyncio
async def test_a_server_that_was_idle_knows_what_others_used_meanwhile(
    real_store: Store, limiter: Limiter, usage: BudgetUsage, monkeypatch: Any
) -> None:
    monkeypatch.setattr(budget_usage, "EVERY_S", 0.001)
    other = BudgetUsage(real_store)
    refreshing = asyncio.create_task(usage.run())
    other.add("t", 100)
    other.refresh()
    async with asyncio.timeout(10):
        while not usage._stored or usage._stored.used.get("t") != 100:  # without asking for any
            await asyncio.sleep(0.001)
    refreshing.cancel()
    assert refused(limiter, scope(total_tokens=100), tokens=50).status == 429


def test_a_budget_that_is_not_known_is_not_spent(real_store: Store) -> None:
    limiter = Limiter(BudgetUsage(real_store))
    assert refused(limiter, scope(total_tokens=100)).status == 503
    reserve(limiter, scope(requests_per_minute=1), tokens=0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0ms"), (0.0171, "18ms"), (0.9995, "1s"), (20.0, "20s"), (60.0, "1m0s"), (359.2, "6m0s")],
)
def test_durations_read_as_openais(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_reservation_is_raised_to_what_the_request_can_use_or_refused(limiter: Limiter, usage: BudgetUsage) -> None:
    t = scope(tokens_per_minute=100, total_tokens=1000)
    first = reserve(limiter, t, tokens=0)
    first.raise_to(tokens=70)
    second = reserve(limiter, t, tokens=0)
    with pytest.raises(ApiError) as caught:
        second.raise_to(tokens=31)
    assert (caught.value.status, caught.value.type) == (429, "tokens")
    assert caught.value.headers["x-ratelimit-remaining-tokens"] == "30"
    second.raise_to(tokens=30)
    second.raise_to(tokens=20)
    assert refused(limiter, t).type == "tokens"
    first.commit({TOKENS: 10})
    second.commit({TOKENS: 5})
    assert usage.committed("t") == 15
    assert reserve(limiter, t, tokens=85).headers["x-ratelimit-remaining-tokens"] == "0"


def test_requests_at_once_that_state_no_length_do_not_overdraw_the_tokens_of_a_minute(limiter: Limiter) -> None:
    t, admitted = scope(tokens_per_minute=100), 0
    for _ in range(10):
        try:
            reserve(limiter, t).raise_to(tokens=40)
            admitted += 1
        except ApiError:
            continue
    assert admitted == 2


def test_limits_of_keys_that_are_used_no_more_are_forgotten(limiter: Limiter, clock: Clock) -> None:
    busy = reserve(limiter, scope("busy", requests_per_minute=9, concurrent_requests=1))
    for number in range(3 * KEPT_COUNTERS):
        reserve(limiter, scope(f"k{number}", requests_per_minute=9))
        clock.now += 1
    assert len(limiter._counters) <= KEPT_COUNTERS + 60
    assert refused(limiter, scope("busy", concurrent_requests=1)).status == 429
    busy.commit({})
    reserve(limiter, scope("busy", concurrent_requests=1))


def test_a_limit_in_which_nothing_is_reserved_yet_is_one_for_all_that_run(limiter: Limiter) -> None:
    t = scope("t", tokens_per_minute=100)
    first = reserve(limiter, t)
    for number in range(3 * KEPT_COUNTERS):
        reserve(limiter, scope(f"k{number}", requests_per_minute=9))
    first.raise_to(tokens=100)
    assert refused(limiter, t, tokens=100).status == 429


class Leased:
    """A replica's share of one limit: it takes pieces of a common pool ahead of use."""

    PIECE = 10

    def __init__(self, pool: list[int]) -> None:
        self._pool = pool
        self._mine = self._used = 0

    def used(self, now: float) -> int:
        return self._used

    def wait(self, limit: int, amount: int, now: float) -> float:
        while self._mine < self._used + amount and self._pool[0] + self.PIECE <= limit:
            self._pool[0] += self.PIECE
            self._mine += self.PIECE
        return 0.0 if self._used + amount <= self._mine else 60.0

    def reset(self, now: float) -> float:
        return 60.0

    def reserve(self, amount: int, now: float) -> int:
        self._used += amount
        return amount

    def commit(self, part: int, used: int, now: float) -> None:
        self._used -= part - used


def test_money_days_and_leased_shares_are_one_more_rule_each(usage: BudgetUsage, clock: Clock) -> None:
    pool = [0]

    def replica() -> Limiter:
        def day(_: str) -> Counter:
            return SlidingWindow(86_400.0)

        def leased(_: str) -> Counter:
            return Leased(pool)

        rules = [
            Rule("requests_per_minute", "microdollars", day, too_many_tokens),
            Rule("tokens_per_minute", TOKENS, leased, too_many_tokens),
        ]
        return Limiter(usage, clock=clock, rules=rules)

    here, there = replica(), replica()
    t = scope(requests_per_minute=50, tokens_per_minute=30)
    here.reserve([t], {"microdollars": 30, TOKENS: 15}).commit({"microdollars": 20, TOKENS: 15})
    assert here.reserve([t], {"microdollars": 30}).headers["x-ratelimit-remaining-microdollars"] == "0"
    clock.now += 43_200
    with pytest.raises(ApiError):
        here.reserve([t], {"microdollars": 1})
    there.reserve([t], {TOKENS: 10})
    with pytest.raises(ApiError):
        there.reserve([t], {TOKENS: 1})
    here.reserve([t], {TOKENS: 5})
