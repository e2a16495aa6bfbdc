"""Usage older than a stated time is deleted: whole days, the oldest first, a little at a time between commits."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from typing import Final

from flexgate.server.ledger.entries import MICROSECONDS, microseconds

DAY: Final = 86_400 * MICROSECONDS
REQUESTS_AT_ONCE: Final = 100
PAUSE_SECONDS: Final = 0.02
"""Between two transactions that delete."""
LOOK_SECONDS: Final = 600.0


class Retention:
    """What may be deleted, and when it is looked for next. Nothing is before `keep` says how long usage is kept."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._days: int | None = None
        self._next = 0.0
        self._copies: list[Callable[[], int]] = []
        self._named: dict[str, Callable[[], int]] = {}

    def until(self, copied: Callable[[], int], name: str | None = None) -> None:
        """Keep usage until a copy has it; `copied` gives the sequence up to which it does, from any thread.

        With a name, `uncopied` says how much the copy lacks.
        """
        self._copies.append(copied)
        if name is not None:
            self._named[name] = copied

    def uncopied(self, sequence: int) -> dict[str, int]:
        """How many requests up to a sequence each copy with a name does not have."""
        return {name: max(0, sequence - copied()) for name, copied in self._named.items()}

    def keep(self, days: int) -> None:
        """Keep usage for so many days (UTC), and delete what is older."""
        self._days, self._next = days, 0.0

    def seconds(self) -> float | None:
        """How long until something may have to be deleted; None for never."""
        return None if self._days is None else max(0.0, self._next - time.monotonic())

    def trim(self, connection: sqlite3.Connection) -> None:
        """Delete a little of what is too old, inside a transaction; notes since when usage is whole."""
        assert self._days is not None
        today = microseconds(self._clock()) // DAY * DAY
        copied = min((copied() for copied in self._copies), default=None)
        old = connection.execute(
            "SELECT sequence, ended_at FROM usage WHERE ended_at < ? AND (? IS NULL OR sequence <= ?) "
            "ORDER BY ended_at LIMIT ?",
            (today - self._days * DAY, copied, copied, REQUESTS_AT_ONCE),
        ).fetchall()
        sequences = [(sequence,) for sequence, _ in old]
        connection.executemany("DELETE FROM counts WHERE sequence = ?", sequences)
        connection.executemany("DELETE FROM usage WHERE sequence = ?", sequences)
        if old:
            whole = (old[-1][1] // DAY + 1) * DAY
            connection.execute("UPDATE ledger SET whole_since = max(whole_since, ?)", (whole,))
        self.later(PAUSE_SECONDS if len(old) == REQUESTS_AT_ONCE else LOOK_SECONDS)

    def later(self, seconds: float = LOOK_SECONDS) -> None:
        """Look again after some time."""
        self._next = time.monotonic() + seconds
