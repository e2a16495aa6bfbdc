"""What a kill interrupts counts in budgets as the ledger bills it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from flexgate.policies.agreements import Agreement
from flexgate.policies.documents import BILLION, Cost, Quota, Tenant
from flexgate.policies.errors import StoreFull
from flexgate.policies.store import Store, budgets
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
    assert budgets.read_use(real_store.engine) == (COUNTED, {}, frozenset())


async def test_an_orderly_end_leaves_nothing_to_count(real_store: Store, tmp_path: Path) -> None:
    for _ in range(2):
        journal = Journal(tmp_path / "other.db", clock=now)
        assert journal.interrupted == []
        count_interrupted(real_store, journal, now)
        entry = journal.register(registration("c"))
        await entry.registered()
        entry.end(COMPLETED, NOTHING)
        journal.close()
    assert budgets.read_use(real_store.engine).used == {}


async def test_tokens_count_although_the_price_is_not_known(
    real_store: Store, ledger: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    ledger.interrupted = [(registration("b", version=9), *rest) for _, *rest in ledger.interrupted]
    count_interrupted(real_store, ledger, now)
    assert budgets.read_use(real_store.engine).used == {"t": 14, "t/n@2026-10-31": 1}
    assert "uses count under version 9 of agreement 'paid'" in caplog.text


async def test_a_start_on_a_full_disk_goes_on_and_says_what_is_not_counted(
    real_store: Store, ledger: Journal, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise StoreFull("no room")

    monkeypatch.setattr(budgets, "add_use", full)
    with caplog.at_level(logging.ERROR):
        count_interrupted(real_store, ledger, now)
    assert "budgets lack what 1 interrupted requests used: no room" in caplog.text
