"""Where usage is read from: this server's ledger, or the database that several servers copy theirs to."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Final, Protocol

from flexgate.server.ledger.errors import LedgerError, TooMuchAsked
from flexgate.server.ledger.log import log_of

INSTRUCTIONS: Final = 10_000
"""Of SQLite's machine, between two looks at the clock."""


class Source(Protocol):
    """The tables `usage` and `parts`, of one server or of several; methods block."""

    def read(self, query: str, values: Sequence[object], *, seconds: float, most: int) -> list[tuple[Any, ...]]:
        """At most so many rows of a query, whose values stand as `?`, in bounded time.

        Raises:
            LedgerError: it cannot be read.
            TooMuchAsked: the query takes too long.
        """

    def whole_since(self) -> int:
        """The time in Unix seconds before which usage was deleted; 0 for none. Raises `LedgerError`."""


class Local:
    """A ledger in its file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, query: str, values: Sequence[object], *, seconds: float, most: int) -> list[tuple[Any, ...]]:
        """As `Source`."""
        with log_of(self._path.absolute()).reading(seconds), opened(self._path) as connection:
            deadline = time.monotonic() + seconds
            connection.set_progress_handler(lambda: time.monotonic() > deadline, INSTRUCTIONS)
            try:
                return list(islice(connection.execute(query, values), most))
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
                    raise
                raise TooMuchAsked(f"the sums took longer than {seconds:g} seconds") from error

    def whole_since(self) -> int:
        """As `Source`. It waits for nothing: what was summed before would be lost."""
        with opened(self._path) as connection:
            return int(connection.execute("SELECT whole_since / 1000000 FROM ledger").fetchone()[0])


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A ledger to be read from, in one state of it; raises `LedgerError`."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            connection.execute("BEGIN")
            yield connection
    except sqlite3.Error as error:
        raise LedgerError(f"the ledger {path} cannot be read: {error}; check the file and its disk") from error


def is_older_copy(ledger: sqlite3.Connection, last: int, request: str | None) -> bool:
    """Whether a ledger never had the request that stood at a sequence: the same numbers would be used again."""
    found = ledger.execute("SELECT request FROM usage WHERE sequence = ?", (last,)).fetchone()
    (given,) = ledger.execute("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'usage'").fetchone()
    return bool(given < last or (found is not None and found != (request,)))
