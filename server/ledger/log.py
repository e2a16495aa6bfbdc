"""The write-ahead log of a ledger, which grows for as long as some reading of the ledger is open.

SQLite begins the log anew when all of it was copied into the database, and nothing reads what it holds. Long readings
that follow each other without a gap would let it grow until the disk is full. Where it is long, none begins until those
that are open have ended, and it was emptied.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Final

from flexgate.server.ledger.errors import LedgerError

MOST_BYTES: Final = 64 << 20
HOLD_SECONDS: Final = 90.0
"""How long no reading begins: longer than any may take."""

logger = logging.getLogger(__name__)


class Log:
    """The log of the ledger at a path, by all threads of this process."""

    def __init__(self, path: Path) -> None:
        self._file = path.with_name(f"{path.name}-wal")
        self._changed = threading.Condition()
        self._open = 0
        self._held_since: float | None = None
        self._next = 0.0  # when readings may be held again, where another process reads on

    @contextmanager
    def reading(self, seconds: float) -> Iterator[None]:
        """A reading that may take long; raises `LedgerError` where it cannot begin within so many seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._held_since is None, seconds):
                raise LedgerError("the ledger's log is being emptied: ask again in a minute")
            self._open += 1
        try:
            yield
        finally:
            with self._changed:
                self._open -= 1

    def is_due(self) -> bool:
        """Whether it should be emptied now: it is long, and no reading is open. None begins until it was."""
        size = self.size()
        with self._changed:
            if self._held_since is None:
                if size <= MOST_BYTES or time.monotonic() < self._next:
                    return False
                self._held_since = time.monotonic()
            return not self._open

    def empty(self, connection: sqlite3.Connection) -> None:
        """Copy it into the database, and let readings begin; where something reads on, `is_due` says so again."""
        with self._changed:
            since = self._held_since
        if since is None:  # it was emptied already
            return
        why = _emptied(connection)
        if why is not None and time.monotonic() - since < HOLD_SECONDS:
            return
        if why is not None:
            self._next = time.monotonic() + HOLD_SECONDS
            logger.error("the log %s has %d bytes and is not emptied: %s", self._file, self.size(), why)
        self.release()

    def release(self) -> None:
        """Let readings begin."""
        with self._changed:
            self._held_since = None
            self._changed.notify_all()

    def size(self) -> int:
        """Its bytes; 0 where there is none, or where its disk does not say."""
        try:
            return self._file.stat().st_size
        except OSError:
            return 0


def _emptied(connection: sqlite3.Connection) -> str | None:
    """Copy the log into the database at once, without a wait for others; what kept it from that."""
    ((wait,),) = connection.execute("PRAGMA busy_timeout").fetchall()
    connection.execute("PRAGMA busy_timeout = 0")  # commits wait for this
    try:
        (busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.Error as error:
        return f"{error}; free space or check its disk"
    finally:
        connection.execute(f"PRAGMA busy_timeout = {wait}")
    return "another process reads the ledger; end it" if busy else None


@cache
def log_of(path: Path) -> Log:
    """The log of a ledger, the same for all that read it; `path` is absolute."""
    return Log(path)
