"""A ledger of an older version becomes one of the newest, as a whole or not at all."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flexgate.server.ledger import schema
from flexgate.server.ledger.journal import Journal

VERSIONS = Path(__file__).parent / "versions"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of version 1, with two requests that have ended and one that runs."""
    file = tmp_path / "ledger.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript((VERSIONS / "1.sql").read_text())
    return file


def read(path: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def columns(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    tables = [name for (name,) in read(path, "SELECT name FROM sqlite_master WHERE type = 'table'")]
    return {name: [row[1:] for row in read(path, f"PRAGMA table_info({name})")] for name in tables}


def opened(path: Path) -> Path:
    Journal(path, clock=lambda: 1.0).close()
    return path


@pytest.mark.parametrize("version", range(1, schema.VERSION))
def test_an_older_ledger_has_the_tables_of_a_new_one(tmp_path: Path, version: int) -> None:
    path = tmp_path / "old.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript((VERSIONS / f"{version}.sql").read_text())
    assert columns(opened(path)) == columns(opened(tmp_path / "new.db"))
    assert read(path, "PRAGMA user_version") == [(schema.VERSION,)]


@pytest.mark.parametrize("at_once", [1, 10_000])
def test_earlier_requests_keep_what_they_used_and_get_their_shares(
    path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(schema, "REQUESTS_AT_ONCE", at_once)
    opened(path)
    assert read(path, "SELECT sequence, request, outcome, completion_tokens FROM usage ORDER BY sequence") == [
        (1, "dec_a", "completed", 4),
        (3, "dec_b", "completed", 4),
        (4, "dec_c", "interrupted", 1),
    ]
    wanted = [
        (1, "news", 4, None, None, 105_263),
        (1, "public", 34, None, None, 894_737),
        (3, "public", 34, None, None, 1_000_000),
        (4, "news", 1, None, None, 250_000),
        (4, "public", 3, None, None, 750_000),
    ]
    found = "sequence, expert, prompt_mass + completion_mass, agreement, agreement_version, share_ppm"
    assert read(path, f"SELECT {found} FROM parts ORDER BY sequence, expert") == wanted


def test_what_cannot_be_brought_up_to_date_stays_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    before = columns(path)
    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, fail))
    with pytest.raises(schema.LedgerError, match="cannot be opened: database or disk is full"):
        opened(path)
    assert (columns(path), read(path, "PRAGMA user_version")) == (before, [(1,)])
    monkeypatch.undo()
    opened(path)


def test_a_request_of_version_2_keeps_its_agreement_and_has_no_digests(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript((VERSIONS / "2.sql").read_text())
    opened(path)
    found = "SELECT agreement, agreement_version, package FROM parts WHERE expert = 'news' ORDER BY sequence"
    assert read(path, found) == [("a-news", 4, None)] * 2
    assert read(path, "SELECT DISTINCT prompt_sha256, answer_sha256 FROM usage") == [(None, None)]


def test_what_an_older_version_has_marked_ends_when_it_is_opened(tmp_path: Path) -> None:
    """As it did there, where a month may have been closed over a running request."""
    path, before = tmp_path / "old.db", time.time()
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript((VERSIONS / "8.sql").read_text())
    opened(path)
    ((ended,),) = read(path, "SELECT ended_at FROM usage WHERE outcome = 'interrupted'")
    assert before <= ended / 1e6 <= time.time()
