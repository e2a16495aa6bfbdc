"""What a kill interrupts counts in budgets as the ledger bills it."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from flexgate.policies.agreements import Agreement
from flexgate.policies.documents import BILLION, Cost, Quota, Tenant
from flexgate.policies.errors import StoreFull
from flexgate.policies.store import Store, budgets, schema
from flexgate.policies.store.budgets import Batch
from flexgate.server.inference.limits.budget_usage import BudgetUsage
from flexgate.server.inference.limits.interrupted import count_interrupted
from flexgate.server.ledger.entries import COMPLETED, NOTHING, RegisteredExpert, Registration, Used
from flexgate.server.ledger.journal import Journal

pytestmark = pytest.mark.asyncio
NOW = 1_793_491_200.0 - 60  # of October 2026, in UTC
USED = Used(10, 0, 4, [30, 0, 0, 10, 0, 0], [4, 0, 4, 4, 0, 4])
"""Of three slots: all 14 positions used slot 0, and the four that are new slot 2 as well."""
COUNTED = {"t": 14, "t/n@2026-10-31": 1, "t/EUR@2026-10": BILLION // 2}


def now() -> float:
    return NOW


def registration(name: str, endpoint: str = "chat", version: int = 1) -> Registration:
    experts = (RegisteredExpert(0, "public", "commons"), RegisteredExpert(2, "news", "gazette", "paid", version))
    return Registration(f"dec_{name}", 5, "t", "key_a", endpoint, "tiny", 7, 3, experts)


@pytest_asyncio.fixture
async def ledger(real_store: Store, tmp_path: Path) -> AsyncIterator[Journal]:
    """Project t has budgets and pays 0.5 EUR where news takes part. It had reserved more than it used at the kill."""
    cost = Cost.model_validate({"amount": "9", "currency": "EUR"})
    quota = Quota(total_tokens=100, requests_per_day=9, requests_per_minute=9, cost_per_month=cost)
    terms = {"id": "paid", "owner": "gazette", "experts": ["news"], "assignee": "everyone", "effect": "permit"}
    duty = {"kind": "compensate", "rate": "0.5", "currency": "EUR", "unit": "request"}
    with real_store.change(actor="test", at=1.0) as change:
        change.put(Tenant(id="t", name="t", quota=quota))
        change.put(Agreement.model_validate({**terms, "duties": [duty]}))
    killed = Journal(tmp_path / "ledger.db", clock=now)
    ended, running = (killed.register(registration(name)) for name in ("a", "b"))
    await ended.registered()
    await running.registered()
    ended.end(COMPLETED, USED)
    await running.cover(14, lambda: USED)
    usage = BudgetUsage(real_store, server=killed.id, clock=now)
    usage.refresh()
    usage.reserve("t", 60)
    usage.refresh()
    again = Journal(tmp_path / "ledger.db", clock=now)
    yield again
    again.close()
    killed.close()


async def test_what_was_used_by_interrupted_requests_takes_the_place_of_what_they_had_reserved(
    real_store: Store, ledger: Journal
) -> None:
    assert budgets.read_use(real_store.engine).elsewhere == {"t": 60}
    count_interrupted(real_store, ledger, now)
    assert budgets.read_use(real_store.engine) == (COUNTED, {}, frozenset(), frozenset())


async def test_an_orderly_end_leaves_nothing_to_count(real_store: Store, tmp_path: Path) -> None:
    for _ in range(2):
        journal = Journal(tmp_path / "other.db", clock=now)
        assert journal.ended_before == journal.ended_at_start
        count_interrupted(real_store, journal, now)
        entry = journal.register(registration("c"))
        await entry.registered()
        entry.end(COMPLETED, NOTHING)
        journal.close()
    assert budgets.read_use(real_store.engine).used == {}


async def test_tokens_count_although_the_price_is_not_known(
    real_store: Store, ledger: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(sqlite3.connect(ledger.path)) as connection, connection:
        connection.execute("UPDATE experts SET agreement_version = 9 WHERE agreement IS NOT NULL")
    count_interrupted(real_store, ledger, now)
    assert budgets.read_use(real_store.engine).used == {"t": 14, "t/n@2026-10-31": 1}
    assert "uses count under version 9 of agreement 'paid'" in caplog.text


async def test_a_start_that_fails_after_a_kill_loses_nothing(
    real_store: Store, ledger: Journal, tmp_path: Path
) -> None:
    ledger.close()  # the ledger has ended them, and the start was refused before they were counted
    with closing(Journal(tmp_path / "ledger.db", clock=now)) as again:
        _told_before(real_store, again)
        count_interrupted(real_store, again, now)
    assert budgets.read_use(real_store.engine).used == COUNTED


async def test_a_kill_of_more_projects_than_counters_are_kept_lets_the_server_start(
    real_store: Store, ledger: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexgate.server.inference.limits.limiter.KEPT_COUNTERS", 1)
    assert count_interrupted(real_store, ledger, now)
    assert budgets.read_use(real_store.engine).used == COUNTED


async def test_what_was_interrupted_counts_once_however_often_the_server_starts(
    real_store: Store, ledger: Journal, tmp_path: Path
) -> None:
    count_interrupted(real_store, ledger, now)
    budgets.forget(real_store.engine, NOW + 2 * budgets.FORGOTTEN_AFTER_S)
    count_interrupted(real_store, ledger, now)
    ledger.close()
    with closing(Journal(tmp_path / "ledger.db", clock=now)) as again:
        count_interrupted(real_store, again, now)
    assert budgets.read_use(real_store.engine).used == COUNTED


async def test_a_database_that_was_put_back_gets_what_it_has_not(real_store: Store, ledger: Journal) -> None:
    _told_before(real_store, ledger)
    count_interrupted(real_store, ledger, now)
    with budgets.writing(real_store.engine) as connection:
        for table in (schema.token_use, schema.use_batches):
            connection.execute(table.delete())
    _told_before(real_store, ledger)
    count_interrupted(real_store, ledger, now)
    assert budgets.read_use(real_store.engine).used == COUNTED


def _told_before(store: Store, ledger: Journal) -> None:
    """An earlier start has counted what there was, up to the request that had ended."""
    budgets.add_use(store.engine, {}, Batch(budgets.interruptions_writer(ledger.id), 1), NOW)


async def test_what_the_database_does_not_take_is_tried_again_and_keeps_what_runs_meanwhile(
    real_store: Store, ledger: Journal, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise StoreFull("no room")

    with monkeypatch.context() as patched, caplog.at_level(logging.ERROR):
        patched.setattr(budgets, "add_use", full)
        assert not count_interrupted(real_store, ledger, now)
    assert "budgets lack what interrupted requests used, until the database takes it: no room" in caplog.text
    usage = BudgetUsage(real_store, server=ledger.id, clock=now)
    usage.later = lambda: count_interrupted(real_store, ledger, now, serving=True)
    usage.reserve("t", 7)
    usage.refresh()
    usage.refresh()
    assert usage.later is None
    assert budgets.read_use(real_store.engine) == (COUNTED, {"t": 7}, frozenset(), frozenset())
