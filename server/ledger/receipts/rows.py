"""Requests as the ledger has them on disk, for receipts."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from typing import Any

from flexgate.server.ledger.entries import Registration, decode_registration
from flexgate.server.ledger.receipts.leaves import PARTS, USAGE, Recorded


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


def _parts(connection: sqlite3.Connection, first: int, last: int) -> dict[int, list[tuple[Any, ...]]]:
    query = f"SELECT {PARTS} FROM parts WHERE sequence BETWEEN ? AND ? ORDER BY sequence, owner, expert"
    found: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
    for part in connection.execute(query, (first, last)).fetchall():
        found[part[0]].append(part)
    return found
