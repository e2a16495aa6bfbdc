"""Denied requests leave the audit log once they are old enough; changes never do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from flexgate.policies.errors import StoreError
from flexgate.policies.store.store import Store

DAY: Final = 86_400.0
LOOK_EVERY_S: Final = 3600.0
ACTOR: Final = "retention"

logger = logging.getLogger(__name__)


def trim_denials(store: Store, *, days: float, now: float, actor: str, spare: float = 0.0) -> int:
    """Remove denied requests older than `days` before `now` (Unix seconds); returns how many entries went. Blocks.

    With `spare`, only once the oldest is too old by so many seconds: each trimming is an entry itself.
    """
    trimmed = 0
    while went := store.trim_audit(before=now - days * DAY, actor=actor, at=now, spare=spare):
        trimmed += went
        spare = 0.0
    return trimmed


class Retention:
    """Trims the audit log of one server's database; `run` does so again and again."""

    def __init__(self, store: Store, *, days: int, clock: Callable[[], float]) -> None:
        self._store = store
        self._days = days
        self._clock = clock

    def trim(self) -> None:
        """Trim what is due; a store that fails is asked again the next time. Blocks."""
        try:
            trimmed = trim_denials(self._store, days=self._days, now=self._clock(), actor=ACTOR, spare=DAY)
        except StoreError as error:
            logger.error("the audit log is not trimmed: %s", error)
            return
        if trimmed:
            logger.info("%d entries of denied requests are older than %d days and were trimmed", trimmed, self._days)

    async def run(self) -> None:
        """Look every hour, for ever."""
        while True:
            await asyncio.to_thread(self.trim)
            await asyncio.sleep(LOOK_EVERY_S)
