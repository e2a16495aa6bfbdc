"""What budgets have used, on all servers and in the store, whatever befalls either."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from clocks import Clock

from flexgate.policies.documents import Quota
from flexgate.policies.errors import StoreFull, StoreReplaced, StoreUnavailable
from flexgate.policies.store import Store, budgets, database
from flexgate.server.http.errors import Unavailable
from flexgate.server.inference.limits.budget_usage import RENEWED_EVERY_S, WRITTEN_WITHIN_S, BudgetUsage
from flexgate.server.inference.limits.limiter import TOKENS, Limiter, LimitScope


@pytest.fixture
def usage(real_store: Store) -> BudgetUsage:
    usage = BudgetUsage(real_store)
    usage.refresh()
    return usage


def test_budgets_are_shared_by_processes_and_survive_restarts(real_store: Store) -> None:
    here, there = BudgetUsage(real_store), BudgetUsage(real_store)
    here.refresh()
    here.add("t", 40)
    here.refresh()
    there.refresh()
    there.add("t", 2)
    assert there.committed("t") == 42
    there.close()
    here.refresh()
    assert here.committed("t") == 42


def test_what_a_killed_server_had_reserved_counts_until_it_starts_again(real_store: Store) -> None:
    killed, other = BudgetUsage(real_store, server="a"), BudgetUsage(real_store, server="b")
    killed.refresh()
    killed.reserve("t", 60)
    killed.refresh()
    other.refresh()
    assert other.reserved("t") == 60
    again = BudgetUsage(real_store, server="a")
    again.refresh()
    assert again.reserved("t") == 0
    again.reserve("u", 1)
    again.add("t", 20)
    again.refresh()
    other.refresh()
    assert (other.committed("t"), other.reserved("t"), other.reserved("u")) == (20, 0, 1)


def test_a_reservation_that_was_not_written_is_written_later(
    real_store: Store, usage: BudgetUsage, monkeypatch: Any
) -> None:
    other = BudgetUsage(real_store)

    usage.reserve("t", 5)
    monkeypatch.setattr(budgets, "add_use", broken)
    with pytest.raises(StoreUnavailable):
        usage.refresh()
    usage.reserve("t", 2)
    usage.commit("t", 1, "t", 5)
    monkeypatch.undo()
    usage.refresh()
    other.refresh()
    assert (other.committed("t"), other.reserved("t"), usage.reserved("t")) == (1, 2, 2)


def test_used_tokens_are_not_lost_while_the_store_is_away(usage: BudgetUsage, monkeypatch: Any) -> None:
    usage.add("t", 5)
    monkeypatch.setattr(budgets, "add_use", broken)
    with pytest.raises(StoreUnavailable):
        usage.refresh()
    usage.add("t", 2)
    assert usage.committed("t") == 7
    monkeypatch.undo()
    usage.refresh()
    assert usage.committed("t") == 7


def test_used_tokens_are_written_once_though_they_cannot_be_read_back(
    real_store: Store, usage: BudgetUsage, monkeypatch: Any
) -> None:
    usage.add("t", 10)
    monkeypatch.setattr(budgets, "read_use", broken)
    with pytest.raises(StoreUnavailable):
        usage.refresh()
    usage.add("t", 5)
    assert usage.committed("t") == 15
    monkeypatch.undo()
    usage.refresh()
    assert usage.committed("t") == 15
    assert budgets.read_use(real_store.engine).used == {"t": 15}


def test_used_tokens_are_counted_once_though_it_is_not_known_whether_they_were_written(
    real_store: Store, usage: BudgetUsage, monkeypatch: Any
) -> None:
    """The database's file lost its name, or the connection broke off, after the commit."""

    def lost(_: object) -> None:
        raise StoreReplaced("moved")

    usage.add("t", 10)
    monkeypatch.setattr(database, "_require_kept", lost)
    for _ in range(3):
        with pytest.raises(StoreReplaced):
            usage.refresh()
        usage.add("t", 1)
        assert usage.committed("t") in (11, 12, 13)
    monkeypatch.undo()
    assert budgets.read_use(real_store.engine).used == {"t": 10}
    usage.refresh()
    assert usage.committed("t") == 13
    assert budgets.read_use(real_store.engine).used == {"t": 13}
    usage.add("t", 5)
    usage.close()
    assert budgets.read_use(real_store.engine).used == {"t": 18}


def test_what_a_server_that_does_not_return_had_reserved_counts_for_a_lease(
    real_store: Store, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    gone, other = (BudgetUsage(real_store, server=name, clock=clock) for name in "ab")
    gone.reserve("t", 60)
    gone.refresh()
    clock.now += budgets.LEASE_S
    other.refresh()
    assert (other.reserved("t"), other.lapsed()) == (60, 0)
    clock.now += 1
    for _ in range(2):
        other.refresh()
    assert (other.reserved("t"), other.lapsed()) == (0, 1)
    assert caplog.text.count("server a has not renewed what it reserved of budgets") == 1
    gone.refresh()  # it was only away
    other.refresh()
    assert (other.reserved("t"), other.lapsed()) == (60, 0)


def test_what_a_long_request_has_reserved_counts_as_long_as_its_server_renews_it(
    real_store: Store, clock: Clock
) -> None:
    here, other = (BudgetUsage(real_store, server=name, clock=clock) for name in "ab")
    here.reserve("t", 60)
    for _ in range(40):
        here.refresh()
        clock.now += RENEWED_EVERY_S
    other.refresh()
    assert other.reserved("t") == 60
    clock.now -= 7 * 86_400  # set back
    here.refresh()
    clock.now += budgets.LEASE_S
    other.refresh()
    assert other.reserved("t") == 60


@pytest.mark.parametrize("field", ["total_tokens", "tokens_per_day"])
def test_budgets_that_cannot_be_written_are_spent_for_a_minute_and_no_longer(
    real_store: Store, clock: Clock, monkeypatch: Any, field: str
) -> None:
    usage = BudgetUsage(real_store, clock=clock, monotonic=clock)
    limiter = Limiter(usage, clock=clock, wall_clock=clock)
    scopes = (LimitScope("project", "t", Quota.model_validate({field: 100})),)
    usage.refresh()
    with monkeypatch.context() as patched:
        patched.setattr(budgets, "add_use", full)
        running = limiter.reserve(scopes, {TOKENS: 10})
        fails(usage)
        clock.now += WRITTEN_WITHIN_S - 1
        fails(usage)
        limiter.reserve(scopes, {TOKENS: 10}).commit({TOKENS: 10})
        clock.now += 1
        with pytest.raises(Unavailable, match="has not been written to the database for a minute") as refused:
            limiter.reserve(scopes, {TOKENS: 10})
        assert (refused.value.code, usage.unwritable()) == ("budget_unwritten", True)
        running.commit({TOKENS: 10})  # what runs ends as ever
        free = (LimitScope("project", "t", Quota.model_validate({"requests_per_minute": 1})),)
        limiter.reserve(free, {TOKENS: 10})
    usage.refresh()
    assert not usage.unwritable()
    limiter.reserve(scopes, {TOKENS: 10})
    assert sum(budgets.read_use(real_store.engine).used.values()) == 20


def test_budgets_are_not_spent_for_ever_while_a_write_hangs_or_what_others_use_cannot_be_read(
    real_store: Store, clock: Clock, monkeypatch: Any
) -> None:
    usage = BudgetUsage(real_store, clock=clock, monotonic=clock)
    usage.refresh()
    asked, answered = threading.Event(), threading.Event()

    def hangs(*_: object) -> None:
        asked.set()
        assert answered.wait(20)

    usage.add("t", 1)
    with monkeypatch.context() as patched:
        patched.setattr(budgets, "add_use", hangs)
        writing = threading.Thread(target=usage.refresh)
        writing.start()
        assert asked.wait(20)
        clock.now += WRITTEN_WITHIN_S
        assert usage.unwritable()
        answered.set()
        writing.join()
    assert not usage.unwritable()
    monkeypatch.setattr(budgets, "read_use", broken)
    clock.now += WRITTEN_WITHIN_S
    with pytest.raises(StoreUnavailable):
        usage.refresh()
    assert usage.unwritable()


@pytest.mark.asyncio
async def test_whatever_goes_wrong_in_a_refresh_it_is_tried_again(
    real_store: Store, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flexgate.server.inference.limits.budget_usage.EVERY_S", 0.01)
    usage, looks = BudgetUsage(real_store), ["a bug"]

    def fail_once() -> bool:
        if looks:
            raise ValueError(looks.pop())
        return True

    usage.later = fail_once
    running = asyncio.create_task(usage.run())
    async with asyncio.timeout(10):
        while usage.committed("t") is None:
            await asyncio.sleep(0.01)
    running.cancel()
    assert "used tokens cannot be written: ValueError" in caplog.text


def test_a_server_on_which_nothing_runs_reads_budgets_that_it_cannot_write(real_store: Store, monkeypatch: Any) -> None:
    monkeypatch.setattr(budgets, "add_use", full)
    monkeypatch.setattr(budgets, "renew", full)
    usage = BudgetUsage(real_store)
    usage.refresh()
    assert usage.committed("t") == 0


def broken(*_: object) -> None:
    raise StoreUnavailable("away")


def full(*_: object) -> None:
    raise StoreFull("no room")


def fails(usage: BudgetUsage) -> None:
    with pytest.raises(StoreFull):
        usage.refresh()
