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
        with self._changed:
            if self._held_since is None:
                if self.size() <= MOST_BYTES or time.monotonic() < self._next:
                    return False
                self._held_since = time.monotonic()
            return not self._open

    def empty(self, connection: sqlite3.Connection) -> None:
        """Copy it into the database, and let readings begin; where something reads on, `is_due` says so again."""
        with self._changed:
            since = self._held_since
        if since is None:  # it was emptied already
            return
        connection.execute("PRAGMA busy_timeout = 0")  # commits wait for this
        (busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy and time.monotonic() - since < HOLD_SECONDS:
            return
        if busy:
            self._next = time.monotonic() + HOLD_SECONDS
            logger.error("the log %s has %d bytes: another process reads the ledger; end it", self._file, self.size())
        self.release()

    def release(self) -> None:
        """Let readings begin."""
        with self._changed:
            self._held_since = None
            self._changed.notify_all()

    def size(self) -> int:
        """Its bytes; 0 where there is none."""
        try:
            return self._file.stat().st_size
        except FileNotFoundError:
            return 0


@cache
def log_of(path: Path) -> Log:
    """The log of a ledger, the same for all that read it; `path` is absolute."""
    return Log(path)
