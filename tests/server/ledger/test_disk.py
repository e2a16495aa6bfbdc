"""What the ledger does on real disks that are full, or that do not answer."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from smalldisk import FreezableDisk, SmallDisk, freezable, mounted

from flexgate.server.ledger import journal as module
from flexgate.server.ledger import opening
from flexgate.server.ledger.entries import COMPLETED, INTERRUPTED, NOTHING, Registration, Used
from flexgate.server.ledger.journal import Journal, LedgerError

pytestmark = pytest.mark.asyncio

DEADLINE = 0.5
Stop = Callable[[], None]


def registration(name: str) -> Registration:
    return Registration(f"dec_{name}", 5, "proj_a", "key_a", "chat", "tiny", 7, 3, ())


def used(completion: int) -> Used:
    return Used(10, 0, completion, [], [])


def rows(path: Path) -> dict[str, tuple[str, int]]:
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT request, outcome, completion_tokens FROM usage").fetchall()
    assert len({request for request, *_ in found}) == len(found)
    return {request: (outcome, tokens) for request, outcome, tokens in found}


async def until_written(journal: Journal) -> None:
    async with asyncio.timeout(20):
        while journal.failing:
            await asyncio.sleep(0.01)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[SmallDisk]:
    with mounted(tmp_path / "disk", 32) as disk:
        yield disk


@contextmanager
def frozen(disk: FreezableDisk) -> Iterator[None]:
    disk.freeze()
    try:
        yield
    finally:
        disk.thaw()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another one writes to the file, and does not end."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


@pytest.fixture(params=["frozen", "locked"])
def hanging(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple]:
    """A journal's path, and what lets its disk hang."""
    monkeypatch.setattr(module, "ANSWER_SECONDS", DEADLINE)
    if request.param == "locked":
        monkeypatch.setattr(opening, "BUSY_SECONDS", 60.0)
        yield tmp_path / "ledger.db", lambda: locked(tmp_path / "ledger.db")
        return
    with freezable(tmp_path / "disk") as disk:
        yield disk.path / "ledger.db", lambda: frozen(disk)


async def test_a_disk_that_hangs_refuses_what_waits_after_the_deadline(hanging: tuple) -> None:
    path, hangs = hanging
    journal = Journal(path, clock=lambda: 9.5)
    running = journal.register(registration("running"))
    await running.cover(11, lambda: used(1))
    began = asyncio.get_running_loop().time()
    with hangs():
        async with asyncio.timeout(DEADLINE + 10):
            waiting = journal.register(registration("waiting"))
            for refused in (waiting.registered(), running.cover(14, lambda: used(4))):
                with pytest.raises(LedgerError, match=r"a commit has taken more than 0\.5 seconds"):
                    await refused
        assert asyncio.get_running_loop().time() - began >= DEADLINE
        assert journal.failing
        with pytest.raises(LedgerError, match="cannot be written"):
            journal.register(registration("meanwhile"))
        waiting.end("ledger_unavailable", NOTHING)
        running.end("ledger_unavailable", used(4))
    await until_written(journal)
    await journal.register(registration("later")).registered()
    journal.close()
    found = rows(path)
    assert found.pop("dec_waiting", ("ledger_unavailable", 0)) == ("ledger_unavailable", 0)
    assert found == {"dec_running": ("ledger_unavailable", 4)}


async def test_a_server_stops_though_its_disk_hangs(hanging: tuple, caplog: pytest.LogCaptureFixture) -> None:
    path, hangs = hanging
    journal = Journal(path, clock=lambda: 9.5)
    entries = [journal.register(registration(name)) for name in "ab"]
    for entry in entries:
        await entry.cover(11, lambda: used(1))
    with hangs():
        for entry in entries:
            entry.end(COMPLETED, used(4))
        async with asyncio.timeout(DEADLINE + 10):
            await asyncio.to_thread(journal.close)
        assert "the usage of 2 requests could not be written" in caplog.text
    journal._writer.join(20)
    journal.close()
    Journal(path, clock=lambda: 10.0).close()
    assert set(rows(path).values()) <= {(COMPLETED, 4), (INTERRUPTED, 1)}
    assert rows(path).keys() == {"dec_a", "dec_b"}


async def test_on_a_full_disk_running_requests_end_and_none_begins(small: SmallDisk) -> None:
    path = small.path / "ledger.db"
    journal = Journal(path, clock=lambda: 9.5)
    entries = [journal.register(registration(str(number))) for number in range(500)]
    await asyncio.gather(*(entry.cover(11, lambda: used(1)) for entry in entries))
    small.fill()
    refused = journal.register(registration("refused"))
    with pytest.raises(LedgerError, match="kept for the ends of running requests: free some space"):
        await refused.registered()
    refused.end("ledger_unavailable", NOTHING)
    for entry in entries:
        with pytest.raises(LedgerError, match="cannot be written"):
            await entry.cover(12, lambda: used(2))
        entry.end("ledger_unavailable", used(2))
    async with asyncio.timeout(20):
        while len(rows(path)) < len(entries):
            await asyncio.sleep(0.01)
    assert journal.failing
    assert set(rows(path).values()) == {("ledger_unavailable", 2)}
    assert journal._owed == []
    small.free()
    await until_written(journal)
    await journal.register(registration("later")).registered()
    journal.close()
    assert "dec_refused" not in rows(path)
