"""How the file of a ledger is opened for the one that writes it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.schema import bring_up_to_date

BUSY_SECONDS: Final = 5.0
"""How long a commit waits for another process that writes to the file, a shell of an operator for instance."""


def open_ledger(path: Path) -> sqlite3.Connection:
    """The file as the one that writes it has it; it is created, or brought up to date. Blocks; raises `LedgerError`."""
    with told(path):
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_SECONDS)
        try:
            bring_up_to_date(connection, path)
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                raise LedgerError(f"the ledger {path} is on a file system without write-ahead logs: move --state-dir")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
        except BaseException:
            connection.close()
            raise
        return connection


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Raise errors of SQLite as those of the ledger."""
    try:
        yield
    except sqlite3.Error as error:
        raise LedgerError(f"the ledger {path} cannot be opened: {error}; check the file and its disk") from error
