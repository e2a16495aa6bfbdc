"""The ledger's log stays bounded, whatever reads the ledger."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from flexgate.server.ledger import journal as module
from flexgate.server.ledger import log
from flexgate.server.ledger.entries import COMPLETED, Registration, Used
from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.journal import Journal
from flexgate.server.ledger.reading import Local
from flexgate.server.ledger.usage import Reading

pytestmark = pytest.mark.asyncio

LONGEST = 1 << 20


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    monkeypatch.setattr(log, "MOST_BYTES", LONGEST)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    made = Journal(tmp_path / "ledger.db", clock=lambda: 9.5)
    yield made
    made.close()


def size(journal: Journal) -> int:
    return journal.path.with_name("ledger.db-wal").stat().st_size


async def record(journal: Journal, name: str) -> None:
    """A request whose row takes pages of its own."""
    entry = journal.register(Registration(name, 5, "proj_a", "key_a", "chat", "x" * 20_000, 7, 3, ()))
    entry.end(COMPLETED, Used(10, 0, 4, [], []))
    await entry.registered()


@contextmanager
def read_without_a_gap(path: Path) -> Iterator[list[int]]:
    """Several readings at once, each of which is followed by another one; gives what they found."""
    stop, found = threading.Event(), list[int]()

    def read() -> None:
        while not stop.is_set():
            with Reading(path, seconds=20) as reading:
                found.append(len(reading.rows("SELECT sequence FROM usage", ())))
                stop.wait(0.03)

    threads = [threading.Thread(target=read, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)


async def test_the_log_stays_bounded_while_it_is_read_without_a_gap(journal: Journal) -> None:
    sizes, requests = [], 600
    with read_without_a_gap(journal.path) as found:
        for number in range(requests):
            await record(journal, f"dec_{number}")
            sizes.append(size(journal))
    assert max(sizes) < 8 * LONGEST
    assert max(found) > requests // 2  # readings went on
    with Reading(journal.path) as reading:
        assert len(reading.rows("SELECT sequence FROM usage", ())) == requests


async def test_readings_go_on_and_the_reason_is_logged_where_another_process_reads_for_long(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log, "HOLD_SECONDS", 0.1)
    await record(journal, "dec_first")
    with closing(sqlite3.connect(journal.path)) as other:
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM usage").fetchone()
        for number in range(60):
            await record(journal, f"dec_{number}")
        async with asyncio.timeout(10):
            while "another process reads the ledger" not in caplog.text:
                await asyncio.sleep(0.01)
        with Reading(journal.path) as reading:
            assert len(reading.rows("SELECT sequence FROM usage", ())) == 61
    async with asyncio.timeout(10):
        while size(journal) > LONGEST:
            await asyncio.sleep(0.01)


async def test_a_reading_that_cannot_begin_in_time_is_refused(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Reading(journal.path):
        monkeypatch.setattr(log, "MOST_BYTES", -1)
        async with asyncio.timeout(10):
            while log.log_of(journal.path)._held_since is None:
                await asyncio.sleep(0.01)
        monkeypatch.setattr(log, "MOST_BYTES", LONGEST)
        second = Reading(journal.path, seconds=0.01)
        with pytest.raises(LedgerError, match="is being emptied: ask again in a minute"), second:
            pass
    with Reading(journal.path, seconds=20) as third:
        assert third.rows("SELECT count(*) FROM usage", ()) == [(0,)]


async def test_what_was_summed_is_whole_also_while_the_log_waits_to_be_emptied(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Reading(journal.path):
        monkeypatch.setattr(log, "MOST_BYTES", -1)
        async with asyncio.timeout(10):
            while log.log_of(journal.path)._held_since is None:
                await asyncio.sleep(0.01)
        assert Local(journal.path).whole_since() == 0


async def test_a_log_that_a_full_disk_keeps_from_being_emptied_holds_readings_no_longer_than_stated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log, "MOST_BYTES", -1)

    class FullDisk(sqlite3.Connection):
        def execute(self, sql: str, *given: Any) -> sqlite3.Cursor:
            if "checkpoint" in sql:
                raise sqlite3.OperationalError("disk I/O error")
            return super().execute(sql, *given)

    held = log.Log(tmp_path / "ledger.db")
    with closing(sqlite3.connect(tmp_path / "ledger.db", factory=FullDisk)) as connection:
        connection.execute("PRAGMA busy_timeout = 4321")
        assert held.is_due()
        held.empty(connection)
        assert held._held_since is not None
        monkeypatch.setattr(log, "HOLD_SECONDS", 0.0)
        held.empty(connection)
        assert connection.execute("PRAGMA busy_timeout").fetchone() == (4321,)
    with held.reading(0.0):
        assert "is not emptied: disk I/O error" in caplog.text
