"""Budget usage: the tokens that projects and keys with a budget have used, here and in the store.

Requests are checked against both in memory. Another process's use is known after its next write and
our next reading, about two seconds later at most.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Final

from flexgate.policies.errors import StoreError
from flexgate.policies.store import budgets
from flexgate.policies.store.budgets import Batch
from flexgate.policies.store.store import Store

EVERY_S: Final = 1.0

logger = logging.getLogger(__name__)


class BudgetUsage:
    """`run` writes and reads again and again. Safe to use from several threads."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives Unix seconds."""
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()
        self._batch = Batch(secrets.token_hex(16), 0)
        self._stored: dict[str, int] | None = None
        self._writing: dict[str, int] = {}
        self._unwritten: dict[str, int] = {}
        self._requested = False
        self._forgot = -1  # the day, as a number, on which what counts no more was last removed

    def committed(self, scope: str) -> int | None:
        """Tokens used so far; None before the store was read for the first time."""
        with self._lock:
            self._requested = True
            if self._stored is None:
                return None
            return sum(part.get(scope, 0) for part in (self._stored, self._writing, self._unwritten))

    def add(self, scope: str, tokens: int) -> None:
        """Note what a request used."""
        with self._lock:
            self._unwritten[scope] = self._unwritten.get(scope, 0) + tokens

    def refresh(self) -> None:
        """Write this process's usage, and read the total of all processes; raises `StoreError`. Blocks."""
        with self._refreshing:
            if self._writing:
                self._write()  # the batch that failed before, as it was: it may have been written all the same
            with self._lock:
                self._writing, self._unwritten = self._unwritten, {}
                self._batch = self._batch._replace(number=self._batch.number + 1)
            self._write()
            stored = budgets.read_use(self._store.engine)
            with self._lock:
                self._stored, self._requested = stored, False
            self._forget()

    async def run(self) -> None:
        """Refresh for ever, whenever there is something to write or usage was requested."""
        while True:
            await asyncio.sleep(EVERY_S)
            if not (self._requested or self._unwritten or self._writing):
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
            lost = sum(self._unwritten.values()) + sum(self._writing.values())
            logger.error("%d used tokens could not be written", lost)

    def _forget(self) -> None:
        """Remove what counts no more, once a day."""
        now = self._clock()
        if (day := int(now // 86_400)) != self._forgot:
            budgets.forget(self._store.engine, now)
            self._forgot = day

    def _write(self) -> None:
        """Write a batch and count it as stored at once, so that a failed read does not write it again."""
        if self._writing:
            budgets.add_use(self._store.engine, self._writing, self._batch, self._clock())
        with self._lock:
            if self._stored is not None:
                for scope, tokens in self._writing.items():
                    self._stored[scope] = self._stored.get(scope, 0) + tokens
            self._writing = {}
