"""What the journal keeps, whatever happens to its process or its disk."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
from journalkit import registration, rows, used

from flexgate.server.ledger.entries import COMPLETED, INTERRUPTED, Used
from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.journal import Journal

pytestmark = pytest.mark.asyncio


async def test_an_ended_request_is_kept_with_the_part_of_each_expert(journal: Journal, path: Path) -> None:
    entry = journal.register(registration("a"))
    await entry.registered()
    entry.end(COMPLETED, used(10, 4))
    journal.close()
    (row,) = rows(path)
    assert row == {
        "sequence": 1,
        "request": "dec_a",
        "registered_at": 5,
        "ended_at": 9_500_000,
        "outcome": "completed",
        "tenant": "proj_a",
        "key_id": "key_a",
        "endpoint": "chat",
        "model": "tiny",
        "policy_version": 7,
        "weights_epoch": 3,
        "prompt_tokens": 10,
        "cached_tokens": 1,
        "completion_tokens": 4,
        "prompt_sha256": None,
        "answer_sha256": None,
        "catalogue": None,
        "excluded": None,
    }
    names = (
        "sequence",
        "expert",
        "owner",
        "prompt_mass",
        "prompt_positions",
        "completion_mass",
        "completion_positions",
        "agreement",
        "agreement_version",
        "share_ppm",
        "package",
        "duties_sha256",
    )
    assert rows(path, "parts") == [
        dict(zip(names, (1, "public", "commons", 30, 10, 4, 4, None, None, 894_737, None, None), strict=True)),
        dict(zip(names, (1, "news", "gazette", 0, 0, 4, 4, "a-news", 4, 105_263, None, None), strict=True)),
    ]
    assert rows(path, "running") == []


async def test_a_request_ends_once(journal: Journal, path: Path) -> None:
    entry = journal.register(registration("a"))
    entry.end(COMPLETED, used(10, 4))
    entry.end("expert_revoked", used(10, 9))
    journal.close()
    assert [(row["outcome"], row["completion_tokens"]) for row in rows(path)] == [("completed", 4)]


async def test_what_was_running_ends_at_the_next_start_with_its_last_mark(path: Path) -> None:
    first = Journal(path, clock=lambda: 1.0)
    marked, unmarked = first.register(registration("marked")), first.register(registration("unmarked"))
    await marked.cover(12, lambda: used(10, 2))
    await marked.cover(15, lambda: used(10, 5))
    await unmarked.registered()
    first.close()
    Journal(path, clock=lambda: 2.0).close()
    Journal(path, clock=lambda: 3.0).close()
    found = {row["request"]: row for row in rows(path)}
    assert {row["outcome"] for row in found.values()} == {INTERRUPTED}
    assert {row["ended_at"] for row in found.values()} == {5, 1_000_000}
    assert [found[name]["completion_tokens"] for name in ("dec_marked", "dec_unmarked")] == [5, 0]
    assert [row["completion_mass"] for row in rows(path, "parts")] == [5, 5]


async def test_an_interrupted_request_ends_when_it_was_last_marked_whenever_the_server_starts_again(path: Path) -> None:
    at = [1.0]
    first = Journal(path, clock=lambda: at[0])
    marked, unmarked = first.register(registration("marked")), first.register(registration("unmarked"))
    await asyncio.gather(marked.registered(), unmarked.registered())
    for at[0], tokens in ((2.0, 1), (3.0, 2)):
        await marked.cover(10 + tokens, lambda tokens=tokens: used(10, tokens))
    first.close()
    Journal(path, clock=lambda: 90.0).close()
    assert {row["request"]: row["ended_at"] for row in rows(path)} == {"dec_unmarked": 5, "dec_marked": 3_000_000}
    assert [row["request"] for row in rows(path)] == ["dec_unmarked", "dec_marked"]  # in the order of their ends


async def test_a_time_is_over_once_no_running_request_could_end_in_it(path: Path) -> None:
    at = [1.0]
    journal = Journal(path, clock=lambda: at[0])
    entry = journal.register(registration("a"))
    await entry.cover(11, lambda: used(10, 1))
    at[0] = 5.0
    assert (journal.has_written(1.0), journal.has_written(4.0)) == (True, False)
    await entry.cover(12, lambda: used(10, 2))
    assert (journal.has_written(4.0), journal.has_written(6.0)) == (True, False)
    entry.end(COMPLETED, used(10, 2))
    await journal.register(registration("b")).registered()
    assert journal.has_written(1e-6)
    journal.close()


async def test_a_time_is_not_over_while_a_request_of_it_is_written(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert, go_on = journal._insert, threading.Event()

    def wait(batch: Any) -> None:
        go_on.wait(20)
        insert(batch)

    monkeypatch.setattr(journal, "_insert", wait)
    entry = journal.register(registration("a"))
    entry.end(COMPLETED, used(10, 1))
    assert (journal.has_written(1e-6), journal.has_written(10.0)) == (True, False)
    go_on.set()
    await entry.registered()
    assert journal.has_written(10.0)


async def test_a_time_is_not_over_while_a_request_that_began_in_it_is_registered(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert, go_on = journal._insert, threading.Event()

    def wait(batch: Any) -> None:
        go_on.wait(20)
        insert(batch)

    monkeypatch.setattr(journal, "_insert", wait)
    entry = journal.register(registration("a"))  # 5 microseconds after the beginning
    assert (journal.has_written(5e-6), journal.has_written(1.0)) == (True, False)
    go_on.set()
    await entry.registered()
    assert not journal.has_written(1.0)


async def test_marks_go_back_in_time_with_no_clock(path: Path) -> None:
    at = [50.0]
    first = Journal(path, clock=lambda: at[0])
    entry = first.register(registration("a"))
    await entry.cover(11, lambda: used(10, 1))
    at[0] = 40.0
    await entry.cover(12, lambda: used(10, 2))
    assert first.has_written(50.0)
    first.close()
    Journal(path, clock=lambda: 90.0).close()
    assert [row["ended_at"] for row in rows(path)] == [50_000_000]


async def test_tokens_that_a_mark_covers_wait_for_none(journal: Journal) -> None:
    entry, asked = journal.register(registration("a")), []

    def now() -> Used:
        asked.append(True)
        return used(10, 8)

    await entry.cover(12, now)
    await entry.cover(18, now)
    assert len(asked) == 1
    await entry.cover(19, lambda: used(10, 9))


async def test_a_hundred_requests_at_once_are_kept(journal: Journal, path: Path) -> None:
    entries = [journal.register(registration(str(number))) for number in range(100)]

    async def stream(entry: Any, tokens: int) -> None:
        for count in range(1, tokens):
            await entry.cover(10 + count, lambda count=count: used(10, count))
        entry.end(COMPLETED, used(10, tokens))

    await asyncio.gather(*(stream(entry, 2 + number % 9) for number, entry in enumerate(entries)))
    journal.close()
    assert {row["request"]: row["completion_tokens"] for row in rows(path)} == {
        f"dec_{number}": 2 + number % 9 for number in range(100)
    }


async def test_a_client_that_leaves_while_its_mark_is_written_keeps_nobody_from_theirs(journal: Journal) -> None:
    leaving, staying = journal.register(registration("a")), journal.register(registration("b"))
    task = asyncio.create_task(leaving.cover(11, lambda: used(10, 1)))
    await asyncio.sleep(0)
    task.cancel()
    await staying.cover(11, lambda: used(10, 1))
    await leaving.registered()
    leaving.end("disconnected", used(10, 1))


async def test_a_mark_of_a_request_that_does_not_run_is_refused(journal: Journal) -> None:
    with pytest.raises(LedgerError, match="no running request dec_a"):
        await journal.mark("dec_a", used(1, 1))


async def test_what_ends_after_the_ledger_was_closed_keeps_its_mark(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(path, clock=lambda: 1.0)
    entry = journal.register(registration("a"))
    await entry.cover(11, lambda: used(10, 1))
    journal.close()
    entry.end(COMPLETED, used(10, 4))
    assert "dec_a ended after the ledger was closed" in caplog.text
    Journal(path, clock=lambda: 2.0).close()
    assert [(row["outcome"], row["completion_tokens"]) for row in rows(path)] == [(INTERRUPTED, 1)]


async def test_every_commit_reaches_the_disk(journal: Journal) -> None:
    found = {name: journal._connection.execute(f"PRAGMA {name}").fetchone() for name in ("synchronous", "journal_mode")}
    assert found == {"synchronous": (2,), "journal_mode": ("wal",)}


async def test_a_clock_that_was_set_back_ends_nothing_before_it_began(path: Path) -> None:
    first = Journal(path, clock=lambda: 50.0)
    await first.register(registration("a")).registered()
    ended = first.register(registration("b"))
    ended.end(COMPLETED, used(1, 1))
    await ended.registered()
    first.close()
    Journal(path, clock=lambda: 1.0).close()
    assert [row["ended_at"] for row in rows(path)] == [50_000_000, 50_000_000]


async def test_ends_follow_one_another_though_the_clock_is_set_back(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for times in ((50.0, 20.0), (30.0, 60.0)):
        at = [times[0]]
        journal = Journal(path, clock=lambda at=at: at[0])
        for at[0] in times:
            entry = journal.register(registration(str(at[0])))
            entry.end(COMPLETED, used(1, 1))
            await entry.registered()
        journal.close()
    assert [row["ended_at"] for row in rows(path)] == [50_000_000, 50_000_000, 50_000_000, 60_000_000]
    assert "the clock is 20 seconds behind the newest end or closed month" in caplog.text


async def test_a_clock_that_is_set_back_is_logged_once_while_the_server_runs(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    at = [0.0]
    journal = Journal(path, clock=lambda: at[0])
    for at[0] in (50.0, 49.5, 20.0, 30.0, 50.0, 10.0):
        journal.register(registration(str(at[0]))).end(COMPLETED, used(1, 1))
    journal.close()
    logged = [record.getMessage() for record in caplog.records if "behind" in record.getMessage()]
    assert [text.partition(" seconds")[0] for text in logged] == ["the clock is 30", "the clock is 40"]


def spoil_nothing(path: Path) -> None:
    path.write_bytes(b"no database at all, though long enough to be taken for one" * 20)


def spoil_other(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE tenants (id TEXT)")
    connection.close()


def spoil_newer(path: Path) -> None:
    Journal(path, clock=lambda: 1.0).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()


def spoil_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_nothing, "cannot be opened: file is not a database"),
        (spoil_other, "is not a ledger of flexgate: move it away"),
        (spoil_newer, "is a ledger of version 99, not [0-9]+: use the newer flexgate"),
        (spoil_folder, "cannot be opened: unable to open database file"),
    ],
)
async def test_what_is_no_ledger_is_refused_with_its_path(path: Path, spoil: Any, said: str) -> None:
    spoil(path)
    with pytest.raises(LedgerError, match=said) as error:
        Journal(path, clock=lambda: 1.0)
    assert str(path) in str(error.value)
