"""Usage that is old enough is deleted, whole days at a time, and nothing waits for it."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest

from flexgate.server.ledger import retention
from flexgate.server.ledger.entries import COMPLETED, RegisteredExpert, Registration, Used
from flexgate.server.ledger.journal import Journal

pytestmark = pytest.mark.asyncio

DAY = 86_400.0
EXPERTS = (RegisteredExpert(0, "public", "commons"), RegisteredExpert(1, "news", "gazette"))


class World:
    """A journal whose clock a test sets."""

    def __init__(self, path: Path) -> None:
        self.now, self.numbers = 100 * DAY, count()
        self.journal = Journal(path, clock=lambda: self.now)

    async def record(self, day: float, count: int = 1) -> None:
        """As many requests that end on a day."""
        self.now = day * DAY
        entries = []
        for number in range(count):
            name = f"dec_{day}_{number}"
            entry = self.journal.register(Registration(name, 5, "p", "k", "chat", "tiny", 7, 3, EXPERTS))
            entry.end(COMPLETED, Used(10, 0, 1, [10, 0, 10, 0], [1, 1, 1, 1]))
            entries.append(entry.registered())
        await asyncio.gather(*entries)
        await self.written()

    async def written(self) -> None:
        """Once whatever came before is on the disk."""
        entry = self.journal.register(Registration(f"last_{next(self.numbers)}", 5, "p", "k", "chat", "tiny", 7, 3, ()))
        await entry.registered()

    def select(self, query: str) -> list[tuple]:
        with closing(sqlite3.connect(self.journal.path)) as connection:
            return connection.execute(query).fetchall()

    def days(self) -> list[int]:
        return [day for (day,) in self.select("SELECT DISTINCT ended_at / 86400000000 FROM usage ORDER BY 1")]

    async def until(self, days: list[int]) -> None:
        """Once usage of these days is there and of no others."""
        async with asyncio.timeout(20):
            while self.days() != days:
                await self.written()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(retention, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(retention, "PAUSE_SECONDS", 0.0)
    made = World(tmp_path / "ledger.db")
    yield made
    made.journal.close()


async def test_whole_days_are_deleted_once_they_are_old_enough(world: World) -> None:
    for day in (100, 100.9, 101, 102):
        await world.record(day, count=3)
    world.now = 132.5 * DAY
    world.journal.retention.keep(32)
    await world.until([100, 101, 102])
    assert world.select("SELECT whole_since FROM ledger") == [(0,)]
    world.now = 133 * DAY
    await world.until([101, 102])
    assert world.select("SELECT whole_since FROM ledger") == [(101 * DAY * 1e6,)]
    assert world.select("SELECT count(DISTINCT sequence), count(*) FROM parts") == [(6, 12)]
    world.now = 190 * DAY
    await world.until([])


async def test_nothing_is_deleted_that_a_copy_has_not_got(world: World) -> None:
    await world.record(100, count=5)
    world.now = 300 * DAY
    receipts, shared = [0], [0]
    world.journal.retention.until(lambda: receipts[0])
    world.journal.retention.until(lambda: shared[0])
    world.journal.retention.keep(32)
    for _ in range(20):
        await world.written()
    assert len(world.select("SELECT * FROM usage")) == 5
    receipts[0], shared[0] = 5, 3
    async with asyncio.timeout(20):
        while len(world.select("SELECT * FROM usage")) != 2:
            await world.written()
    for _ in range(20):
        await world.written()
    assert world.select("SELECT sequence FROM usage") == [(4,), (5,)]


async def test_numbers_of_deleted_requests_are_not_given_again(world: World) -> None:
    await world.record(100, count=3)
    world.now = 300 * DAY
    world.journal.retention.keep(32)
    await world.until([])
    await world.record(301)
    assert world.select("SELECT sequence FROM usage") == [(4,)]


async def test_deleting_is_done_in_small_transactions_between_commits(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.record(100, count=200)
    monkeypatch.setattr(retention, "REQUESTS_AT_ONCE", 7)
    trim, taken = retention.Retention.trim, []

    def seen(self: retention.Retention, connection: sqlite3.Connection) -> None:
        before = connection.total_changes
        trim(self, connection)
        taken.append(connection.total_changes - before)

    monkeypatch.setattr(retention.Retention, "trim", seen)
    world.now = 300 * DAY
    world.journal.retention.keep(32)
    await world.until([])
    assert max(taken) == 7 * 3 + 1, "requests, the two parts of each, and since when usage is whole"
    assert len([one for one in taken if one]) == -(-200 // 7)
