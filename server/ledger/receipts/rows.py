"""Requests as the ledger has them on disk, for receipts."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Sequence

from flexgate.server.ledger.entries import Registration, decode_registration
from flexgate.server.ledger.receipts.leaves import COUNTS, USAGE, Names, Recorded


def read_after(connection: sqlite3.Connection, sequence: int, limit: int) -> list[Recorded]:
    """Requests that ended, in order, from the one after a number on."""
    usage = f"SELECT {USAGE} FROM usage WHERE sequence > ? ORDER BY sequence LIMIT ?"
    rows = connection.execute(usage, (sequence, limit)).fetchall()
    if not rows:
        return []
    parts = _parts(connection, rows[0][0], rows[-1][0])
    return [Recorded(row, parts.get(row[0], ())) for row in rows]


def read_one(connection: sqlite3.Connection, request: str) -> Recorded | None:
    """A request that ended."""
    row = connection.execute(f"SELECT {USAGE} FROM usage WHERE request = ?", (request,)).fetchone()
    return None if row is None else Recorded(row, _parts(connection, row[0], row[0]).get(row[0], ()))


def read_running(connection: sqlite3.Connection, request: str) -> Registration | None:
    """A request that has not ended yet."""
    row = connection.execute("SELECT registration FROM running WHERE request = ?", (request,)).fetchone()
    return None if row is None else decode_registration(row[0])


def newest(connection: sqlite3.Connection) -> int:
    """The highest number that the ledger has given a request."""
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'usage'").fetchone()
    return 0 if row is None else int(row[0])


def _parts(connection: sqlite3.Connection, first: int, last: int) -> dict[int, list[tuple[Names, Sequence[int]]]]:
    query = f"SELECT sequence, number, {COUNTS} FROM counts WHERE sequence BETWEEN ? AND ?"
    counted = connection.execute(query, (first, last)).fetchall()
    names = {number: _names(connection, number) for number in {row[1] for row in counted}}
    found: dict[int, list[tuple[Names, Sequence[int]]]] = defaultdict(list)
    for sequence, number, *counts in counted:
        found[sequence].append((names[number], counts))
    return found


def _names(connection: sqlite3.Connection, number: int) -> Names:
    query = f"SELECT {', '.join(Names._fields)} FROM experts WHERE number = ?"
    return Names(*connection.execute(query, (number,)).fetchone())
