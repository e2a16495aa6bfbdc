"""What the journal keeps and refuses while its disk is full, fails or is replaced."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from journalkit import registration, rows, used

from flexgate.server.ledger.entries import COMPLETED, NOTHING, Registration
from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.journal import Entry, Journal

pytestmark = pytest.mark.asyncio


async def test_a_full_disk_refuses_registrations_and_marks_and_keeps_ends_until_there_is_room(
    journal: Journal, path: Path
) -> None:
    large = {name: Registration(**{**fields(registration(name)), "model": "x" * 100_000}) for name in ("a", "b")}
    running = journal.register(large["a"])
    await running.cover(11, lambda: used(10, 1))
    full(journal)
    refused = journal.register(large["b"])
    with pytest.raises(LedgerError, match="full; free space or check its disk") as error:
        await refused.registered()
    assert str(path) in str(error.value)
    with pytest.raises(LedgerError):
        await refused.cover(1, lambda: used(1, 0))
    refused.end("ledger_unavailable", NOTHING)
    with pytest.raises(LedgerError):
        await running.cover(13, lambda: used(10, 3))
    running.end(COMPLETED, used(10, 3))
    with pytest.raises(LedgerError, match="cannot be written"):
        journal.register(registration("meanwhile"))
    async with asyncio.timeout(5):
        while not journal._owed:
            await asyncio.sleep(0.001)
    assert rows(path) == []
    journal._connection.execute("PRAGMA max_page_count = 1000000")
    while journal._failing is not None:
        await asyncio.sleep(0.01)
    await journal.register(registration("later")).registered()
    assert [(row["request"], row["completion_tokens"]) for row in rows(path)] == [("dec_a", 3)]
    assert [row["request"] for row in rows(path, "running")] == ["dec_later"]


async def test_a_request_that_ends_before_its_registration_is_refused_is_never_recorded(
    journal: Journal, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_next(journal, monkeypatch)
    entry = journal.register(registration("a"))
    entry.end("stopped", used(10, 0))
    with pytest.raises(LedgerError):
        await entry.registered()
    entry = journal_again(journal, "b")
    while not isinstance(entry, Entry):
        await asyncio.sleep(0.01)
        entry = journal_again(journal, "b")
    await entry.registered()
    assert rows(path) == []


def fails_once_it_is_written(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Let the file be another one after the next commit; empty once it was looked at."""
    looks, require = list[str | None]([None, "the disk has gone"]), journal._file.require

    def fail_once() -> None:
        if looks and (reason := looks.pop(0)):
            raise LedgerError(reason)
        require()

    monkeypatch.setattr(journal._file, "require", fail_once)
    monkeypatch.setattr("flexgate.server.ledger.journal.RETRY_SECONDS", 0.01)
    return looks


async def test_a_request_that_was_refused_leaves_no_row_though_the_disk_had_written_it(
    journal: Journal, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_once_it_is_written(journal, monkeypatch)
    with pytest.raises(LedgerError, match="the disk has gone"):
        await journal.register(registration("a")).registered()
    while journal.failing:
        await asyncio.sleep(0.01)
    await journal.register(registration("b")).registered()
    assert [row["request"] for row in rows(path, "running")] == ["dec_b"]


async def test_an_end_that_the_disk_had_written_though_it_failed_is_kept_once(
    journal: Journal, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [journal.register(registration(name)) for name in ("a", "b")]
    await asyncio.gather(*(entry.registered() for entry in entries))
    looks = fails_once_it_is_written(journal, monkeypatch)
    for entry, tokens in zip(entries, (4, 5), strict=True):
        entry.end(COMPLETED, used(10, tokens))
        async with asyncio.timeout(5):
            while looks or journal._owed or journal.failing:
                await asyncio.sleep(0.001)
    await journal.register(registration("c")).registered()
    assert [(row["request"], row["completion_tokens"]) for row in rows(path)] == [("dec_a", 4), ("dec_b", 5)]
    assert [row["request"] for row in rows(path, "running")] == ["dec_c"]


async def test_experts_that_a_failed_commit_has_numbered_are_numbered_again(
    journal: Journal, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = journal.register(registration("a"))
    await entry.registered()
    insert, failing = journal._insert, [True]

    def fail_once_it_is_written(batch: Any) -> None:
        insert(batch)
        if failing:
            failing.pop()
            raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(journal, "_insert", fail_once_it_is_written)
    monkeypatch.setattr("flexgate.server.ledger.journal.RETRY_SECONDS", 0.01)
    entry.end(COMPLETED, used(10, 4))
    async with asyncio.timeout(5):
        while not rows(path):
            await asyncio.sleep(0.01)
    assert [part["expert"] for part in rows(path, "parts")] == ["public", "news"]


def journal_again(journal: Journal, name: str) -> Entry | None:
    try:
        return journal.register(registration(name))
    except LedgerError:
        return None


def refuse_next(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next write fail."""
    real, failing = journal._insert, [True]

    def insert(*batch: Any) -> None:
        if failing:
            failing.pop()
            raise sqlite3.OperationalError("disk I/O error")
        real(*batch)

    monkeypatch.setattr(journal, "_insert", insert)
    monkeypatch.setattr("flexgate.server.ledger.journal.RETRY_SECONDS", 0.01)


@pytest.mark.parametrize("moved", [True, False])
async def test_a_ledger_that_was_moved_away_takes_nothing(journal: Journal, path: Path, moved: bool) -> None:
    entry = journal.register(registration("a"))
    await entry.registered()
    path.rename(path.with_suffix(".old"))
    if moved:
        path.write_bytes(b"")
    with pytest.raises(LedgerError, match="replaced or deleted"):
        await entry.cover(11, lambda: used(10, 1))


async def test_no_more_ends_are_owed_than_requests_were_running(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [journal.register(registration(str(number))) for number in range(10)]
    await asyncio.gather(*(entry.registered() for entry in entries))
    monkeypatch.setattr(journal, "_insert", refused_by_the_disk)
    for number, entry in enumerate(entries):
        with pytest.raises(LedgerError):
            await entry.cover(11, lambda: used(10, 1))
        for name in range(20):
            with pytest.raises(LedgerError):
                await journal.register(registration(f"{number}-{name}")).registered()
        entry.end("ledger_unavailable", used(10, 1))
        entry.end("ledger_unavailable", used(10, 1))
    journal.close()
    assert len(journal._owed) == len(entries)


def refused_by_the_disk(*_: Any) -> None:
    raise sqlite3.OperationalError("disk I/O error")


def fields(one: Registration) -> dict[str, Any]:
    return {name: getattr(one, name) for name in Registration.__struct_fields__}


def full(journal: Journal) -> None:
    """Let the file not grow any more, nor use again what was freed."""
    journal._connection.execute("VACUUM")
    (pages,) = journal._connection.execute("PRAGMA page_count").fetchone()
    journal._connection.execute(f"PRAGMA max_page_count = {pages}")


async def test_what_is_owed_is_written_without_another_request(
    journal: Journal, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = journal.register(registration("a"))
    await entry.registered()
    refuse_next(journal, monkeypatch)
    entry.end(COMPLETED, used(10, 4))
    while not rows(path):
        await asyncio.sleep(0.01)
