"""Usage of several servers in PostgreSQL: the tables of a ledger once more, filled from each server's own.

Each server's ledger has a number there. A request has the sequence of its ledger, and above that the ledger's number:
whatever is asked of one ledger can be asked of all.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, cast

import psycopg
from psycopg.sql import SQL, Identifier, Literal
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from flexgate.policies.store.postgres import Answering
from flexgate.server.ledger.entries import MICROSECONDS
from flexgate.server.ledger.errors import LedgerError, TooMuchAsked
from flexgate.server.ledger.log import log_of
from flexgate.server.ledger.reading import is_older_copy, opened

SCHEMA: Final = "flexgate_usage"
REQUESTS_AT_ONCE: Final = 2_000
PLACE: Final = 40
"""Bits of a sequence that its own ledger gives."""
SECONDS: Final = 10.0
"""How long PostgreSQL may take for one statement."""
COPY_SECONDS: Final = 30.0
"""How long a whole copy may take: no reading begins, and the ledger's log is not emptied, until it has ended."""
ANSWER_SECONDS: Final = 2.0
"""How much longer the answer is waited for than a statement may take."""
_LOCK: Final = 0x666C7573
_TYPES: Final = {"INTEGER": "BIGINT", "TEXT": "TEXT", "BLOB": "BYTEA"}
_KEYS: Final = {"usage": ("sequence",), "parts": ("sequence", "expert")}


class Shared:
    """The usage of all servers that share a database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._columns: Mapping[str, Sequence[str]] = {}

    def copy(self, path: Path) -> tuple[int, bool]:
        """Copy what is new in this server's ledger, up to `REQUESTS_AT_ONCE`, in one transaction. Blocks.

        Returns:
            The sequence up to which the database has it, and whether there may be more.

        Raises:
            LedgerError: the ledger or the database cannot be used, or the ledger is an older copy of itself.
        """
        long = log_of(path.absolute()).reading(SECONDS)  # it is open for as long as the database takes
        with long, opened(path) as ledger, self._connected(SECONDS, "copying usage", COPY_SECONDS) as shared:
            columns = self._columns or _prepare(shared, ledger)
            name, whole_since = ledger.execute("SELECT id, whole_since FROM ledger").fetchone()
            number, last, request = _place(shared, name)
            if is_older_copy(ledger, last, request):
                raise LedgerError(
                    f"the ledger {path} is an older copy of itself: usage up to number {last} was copied from it, and "
                    "the same numbers would be used again; put the newest copy back, or move it away to begin a new "
                    "ledger"
                )
            rows = _rows(ledger, "usage", columns["usage"], last, REQUESTS_AT_ONCE)
            if rows:
                newest = rows[-1][columns["usage"].index("sequence")]
                request = rows[-1][columns["usage"].index("request")]
                parts = _rows(ledger, "parts", columns["parts"], last, -1, newest)
                _write(shared, "usage", columns["usage"], number, rows)
                _write(shared, "parts", columns["parts"], number, parts)
                shared.execute(
                    "UPDATE servers SET sequence = %s, request = %s WHERE number = %s", (newest, request, number)
                )
                last = newest
            _trim(shared, number, whole_since)
        self._columns = columns  # they are there, now that the transaction has ended
        return last, len(rows) == REQUESTS_AT_ONCE

    def read(self, query: str, values: Sequence[object], *, seconds: float, most: int) -> list[tuple[Any, ...]]:
        """As `Source`; of all servers."""
        with self._connected(seconds) as shared, shared.cursor() as cursor:
            shared.execute("SET TRANSACTION READ ONLY")
            cursor.execute(query.replace("?", "%s").encode(), values)
            rows = cursor.fetchmany(most)
        return [tuple(int(value) if isinstance(value, Decimal) else value for value in row) for row in rows]

    def whole_since(self) -> int:
        """As `Source`; of the server that has kept the least."""
        ((since,),) = self.read("SELECT coalesce(max(whole_since), 0) FROM servers", (), seconds=1.0, most=1)
        return int(since) // MICROSECONDS

    @contextmanager
    def _connected(self, seconds: float, doing: str = "the sums", most: float | None = None) -> Iterator[Answering]:
        """One transaction in which names are those of the copy; a statement, or all in `most` seconds."""
        try:
            with closing(self._engine.raw_connection()) as pooled:
                connection = cast(Answering, pooled.driver_connection)
                with connection.within(most or seconds + ANSWER_SECONDS), connection.transaction():
                    connection.execute(SQL("SET LOCAL search_path = {}").format(Identifier(SCHEMA)))
                    connection.execute(SQL("SET LOCAL statement_timeout = {}").format(Literal(round(seconds * 1000))))
                    yield connection
        except psycopg.errors.QueryCanceled as error:
            raise TooMuchAsked(f"{doing} took longer than {seconds:g} seconds") from error
        except (psycopg.Error, SQLAlchemyError) as error:
            raise LedgerError(f"the database that usage is copied to cannot be used: {error}") from error


def _rows(
    ledger: sqlite3.Connection,
    table: str,
    columns: Sequence[str],
    after: int,
    most: int,
    newest: int | None = None,
) -> list[tuple[Any, ...]]:
    return ledger.execute(
        f"SELECT {', '.join(columns)} FROM {table} WHERE sequence > ? AND (? IS NULL OR sequence <= ?) "
        f"ORDER BY sequence LIMIT ?",
        (after, newest, newest, most),
    ).fetchall()


def _write(shared: Answering, table: str, columns: Sequence[str], number: int, rows: Sequence[tuple[Any, ...]]) -> None:
    assert columns[0] == "sequence"
    names = SQL(", ").join(map(Identifier, columns))
    statement = SQL("COPY {} ({}) FROM STDIN").format(Identifier(table), names)
    with shared.cursor() as cursor, cursor.copy(statement) as copy:
        for sequence, *values in rows:
            copy.write_row((number << PLACE | sequence, *values))


def _prepare(shared: Answering, ledger: sqlite3.Connection) -> dict[str, list[str]]:
    """Create what is missing, also columns that an older server's ledger has not; the ledger's columns."""
    shared.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
    shared.execute(SQL("CREATE SCHEMA IF NOT EXISTS {}").format(Identifier(SCHEMA)))
    shared.execute(
        "CREATE TABLE IF NOT EXISTS servers (number INTEGER GENERATED ALWAYS AS IDENTITY PRIMARY KEY, "
        "ledger TEXT NOT NULL UNIQUE, sequence BIGINT NOT NULL DEFAULT 0, request TEXT, "
        "whole_since BIGINT NOT NULL DEFAULT 0)"
    )
    found = {}
    for table, keys in _KEYS.items():
        columns = {name: _TYPES[kind] for _, name, kind, *_ in ledger.execute(f"PRAGMA table_info({table})")}
        of_key = SQL(", ").join(SQL("{} {}").format(Identifier(key), SQL(columns[key])) for key in keys)
        key = SQL(", ").join(map(Identifier, keys))
        shared.execute(
            SQL("CREATE TABLE IF NOT EXISTS {} ({}, PRIMARY KEY ({}))").format(Identifier(table), of_key, key)
        )
        for name, kind in columns.items():
            shared.execute(
                SQL("ALTER TABLE {} ADD COLUMN IF NOT EXISTS {} {}").format(
                    Identifier(table), Identifier(name), SQL(kind)
                )
            )
        found[table] = list(columns)
    shared.execute("CREATE INDEX IF NOT EXISTS usage_ended_at ON usage (ended_at)")
    return found


def _place(shared: Answering, ledger: str) -> tuple[int, int, str | None]:
    """A ledger's number, and its request that was copied last; locked until the transaction ends."""
    shared.execute("INSERT INTO servers (ledger) VALUES (%s) ON CONFLICT DO NOTHING", (ledger,))
    query = "SELECT number, sequence, request FROM servers WHERE ledger = %s FOR UPDATE"
    return cast(tuple[int, int, str | None], shared.execute(query, (ledger,)).fetchone())


def _trim(shared: Answering, number: int, whole_since: int) -> None:
    """Delete what this server no longer keeps, a little at a time."""
    shared.execute("UPDATE servers SET whole_since = %s WHERE number = %s", (whole_since, number))
    if whole_since:
        first, last = number << PLACE, (number + 1) << PLACE
        old = shared.execute(
            "DELETE FROM usage WHERE sequence IN (SELECT sequence FROM usage WHERE sequence BETWEEN %s AND %s "
            "AND ended_at < %s ORDER BY sequence LIMIT %s) RETURNING sequence",
            (first, last, whole_since, REQUESTS_AT_ONCE),
        ).fetchall()
        shared.execute("DELETE FROM parts WHERE sequence = ANY(%s)", ([sequence for (sequence,) in old],))
