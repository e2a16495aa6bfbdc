"""Budget usage: the tokens that projects and keys with a budget have used, here and in the store.

Requests are checked against both in memory. Another process's use is known after its next write and
our next reading, about two seconds later at most.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Final

from flexgate.policies.errors import StoreError
from flexgate.policies.store import budgets
from flexgate.policies.store.store import Store

EVERY_S: Final = 1.0

logger = logging.getLogger(__name__)


class BudgetUsage:
    """`run` writes and reads again and again. Safe to use from several threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._stored: dict[str, int] | None = None
        self._writing: dict[str, int] = {}
        self._unwritten: dict[str, int] = {}
        self._asked = False

    def committed(self, scope: str) -> int | None:
        """Tokens used so far; None before the store was read for the first time."""
        with self._lock:
            self._asked = True
            if self._stored is None:
                return None
            return sum(part.get(scope, 0) for part in (self._stored, self._writing, self._unwritten))

    def add(self, scope: str, tokens: int) -> None:
        """Note what a request used."""
        with self._lock:
            self._unwritten[scope] = self._unwritten.get(scope, 0) + tokens

    def refresh(self) -> None:
        """Write what was used, and read what everybody used; raises `StoreError`. Blocks."""
        with self._lock:
            self._writing, self._unwritten = self._unwritten, self._writing
            used = dict(self._writing)
        try:
            if used:
                budgets.add_use(self._store.engine, used)
        except StoreError:
            self._take_back()
            raise
        self._settle_written()
        stored = budgets.read_use(self._store.engine)
        with self._lock:
            self._stored, self._asked = stored, False

    async def run(self) -> None:
        """Refresh for ever, whenever there is something to write or somebody asked."""
        while True:
            await asyncio.sleep(EVERY_S)
            if not (self._asked or self._unwritten):
                continue
            try:
                await asyncio.to_thread(self.refresh)
            except StoreError as error:
                logger.error("used tokens cannot be written: %s", type(error).__name__)

    def close(self) -> None:
        """Write the rest at the end of the process, or say how much is lost."""
        try:
            self.refresh()
        except StoreError:
            logger.error("%d used tokens could not be written", sum(self._unwritten.values()))

    def _settle_written(self) -> None:
        """What is written counts as stored at once: reading it back may fail, and must not write it again."""
        with self._lock:
            if self._stored is not None:
                for scope, tokens in self._writing.items():
                    self._stored[scope] = self._stored.get(scope, 0) + tokens
            self._writing = {}

    def _take_back(self) -> None:
        with self._lock:
            for scope, tokens in self._writing.items():
                self._unwritten[scope] = self._unwritten.get(scope, 0) + tokens
            self._writing = {}
