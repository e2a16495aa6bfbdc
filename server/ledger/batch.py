"""What the next commit of the journal writes, and the requests that wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from flexgate.server.ledger.entries import Registration, Used

End = tuple[Registration, str, int, Used]
"""A request that has ended: how, when in microseconds, and what it used."""


@dataclass(slots=True)
class Batch:
    """What one commit writes. A mark replaces an earlier one of its request."""

    registered: list[tuple[Registration, asyncio.Future[None]]] = field(default_factory=list)
    marks: dict[str, tuple[bytes, list[asyncio.Future[None]]]] = field(default_factory=dict)
    ended: list[End] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.registered or self.marks or self.ended)

    @property
    def waiting(self) -> list[asyncio.Future[None]]:
        """What waits for a registration or a mark."""
        return [done for _, done in self.registered] + [done for _, all_ in self.marks.values() for done in all_]

    def refuse(self, error: Exception) -> None:
        """Write the ends alone, and tell everything else why."""
        waiting = self.waiting
        self.registered, self.marks = [], {}
        answer(waiting, error)


def answer(waiting: Iterable[asyncio.Future[None]], error: Exception | None = None) -> None:
    """Tell all that wait, in one turn of their event loop; the first answer counts. Safe from any thread."""
    waiting = list(waiting)

    def tell() -> None:
        for done in waiting:
            if done.done():  # what waited for it was cancelled, or has been told
                continue
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)
                done.exception()  # seen, whether or not anything waits for it

    if waiting:
        with suppress(RuntimeError):  # the loop has ended
            waiting[0].get_loop().call_soon_threadsafe(tell)
