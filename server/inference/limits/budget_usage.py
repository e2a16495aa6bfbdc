"""Budget usage: what projects and keys with a budget have used and reserved, here and on other servers.

Requests are checked against it in memory. What another server uses or reserves is known after its next write and
our next reading, about two seconds later at most.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from flexgate.policies.errors import StoreError
from flexgate.policies.store import budgets
from flexgate.policies.store.budgets import Batch, Reservations, Use
from flexgate.policies.store.store import Store

EVERY_S: Final = 1.0
RENEWED_EVERY_S: Final = budgets.LEASE_S / 15
WRITTEN_WITHIN_S: Final = 60.0
"""After so long without an exchange with the store nothing more is granted: others do not see what is used here,
nor we what they use, and a restart forgets it."""

logger = logging.getLogger(__name__)


class _Changes(NamedTuple):
    """What a batch writes: what was used, to be added, and what is reserved now."""

    used: dict[str, int]
    reserved: dict[str, int]


class BudgetUsage:
    """`run` writes and reads again and again. Safe to use from several threads."""

    def __init__(
        self,
        store: Store,
        *,
        server: str | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`server` has the same id after a restart; `clock` gives Unix seconds."""
        self._monotonic = monotonic
        self._refreshed_at = monotonic()
        self._store = store
        self._server = server or secrets.token_hex(16)
        self._clock = clock
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()
        self._batch = Batch(secrets.token_hex(16), 0)
        self._stored: Use | None = None
        self._writing = _Changes({}, {})
        self._unwritten: dict[str, int] = {}
        self._reserved: dict[str, int] = {}
        self._changed: set[str] = set()  # scopes in which the store does not have what is reserved now
        self.later: Callable[[], bool] | None = None  # what the store did not take at the start, until it does
        self._renewed = 0.0  # when the lease of what is reserved was last renewed
        self._lapsed: frozenset[str] = frozenset()
        self._forgot = -1  # the day, as a number, on which what counts no more was last removed

    def committed(self, scope: str) -> int | None:
        """Tokens used so far; None before the store was read for the first time."""
        with self._lock:
            if self._stored is None:
                return None
            return sum(part.get(scope, 0) for part in (self._stored.used, self._writing.used, self._unwritten))

    def reserved(self, scope: str) -> int:
        """Tokens that are reserved now, here and elsewhere."""
        with self._lock:
            elsewhere = 0 if self._stored is None else self._stored.elsewhere.get(scope, 0)
            return elsewhere + self._reserved.get(scope, 0)

    def reserve(self, scope: str, tokens: int) -> None:
        """Note what a request may use."""
        with self._lock:
            self._change(scope, tokens)

    def commit(self, scope: str, tokens: int, reserved_in: str, reserved: int) -> None:
        """Note what a request used instead of what it had reserved."""
        with self._lock:
            self._change(reserved_in, -reserved)
            self._add(scope, tokens)

    def add(self, scope: str, tokens: int) -> None:
        """Note what was used without a reservation."""
        with self._lock:
            self._add(scope, tokens)

    def unwritten(self) -> dict[str, int]:
        """What was used, and is in no batch yet."""
        with self._lock:
            return dict(self._unwritten)

    def _add(self, scope: str, tokens: int) -> None:
        if tokens:
            self._unwritten[scope] = self._unwritten.get(scope, 0) + tokens

    def _change(self, scope: str, by: int) -> None:
        if by:
            self._reserved[scope] = self._reserved.get(scope, 0) + by
            self._changed.add(scope)

    def refresh(self) -> None:
        """Write what this process used and reserved, and read the total of all; raises `StoreError`. Blocks."""
        with self._refreshing:
            self._write()  # the batch that failed before, as it was: it may have been written all the same
            self._next_batch()
            self._write()
            if self.later is not None and self.later():
                self.later = None
            self._renew()
            stored = budgets.read_use(self._store.engine, self._server, self._clock())
            self._say_lapsed(stored.lapsed)
            with self._lock:
                if self._stored is None:
                    self._changed |= stored.own  # of before a restart
                self._stored = stored
            self._refreshed_at = self._monotonic()

    def unwritable(self) -> bool:
        """Whether nothing was exchanged with the store for so long that requests with a budget are refused."""
        return self._monotonic() - self._refreshed_at >= WRITTEN_WITHIN_S

    def _renew(self) -> None:
        """Let long requests' reservations count on; what a clock that was set back wrote is renewed as well."""
        now = self._clock()
        with self._lock:
            runs = any(self._reserved.values())
        if runs and abs(now - self._renewed) >= RENEWED_EVERY_S:
            budgets.renew(self._store.engine, self._server, now)
            self._renewed = now

    def _say_lapsed(self, lapsed: frozenset[str]) -> None:
        for server in sorted(lapsed - self._lapsed):
            logger.warning("server %s has not renewed what it reserved of budgets: it counts no more", server)
        self._lapsed = lapsed

    def lapsed(self) -> int:
        """How many other servers have reservations that count no more."""
        return len(self._lapsed)

    def _next_batch(self) -> None:
        with self._lock:
            reserved = {scope: self._reserved.get(scope, 0) for scope in self._changed}
            for scope in [scope for scope, tokens in reserved.items() if not tokens]:
                self._reserved.pop(scope, None)
            self._writing, self._unwritten, self._changed = _Changes(self._unwritten, reserved), {}, set()
            self._batch = self._batch._replace(number=self._batch.number + 1)

    async def run(self) -> None:
        """Refresh for ever: a server that was idle must know what others used meanwhile."""
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                await asyncio.to_thread(self.refresh)
                await asyncio.to_thread(self._forget)
            except Exception as error:  # whatever it is, it must be tried again
                logger.error("used tokens cannot be written: %s", type(error).__name__)

    def close(self) -> None:
        """Write the rest at the end of the process, or say how much is lost."""
        try:
            self.refresh()
        except StoreError:
            lost = sum(self._unwritten.values()) + sum(self._writing.used.values())
            logger.error("%d used tokens could not be written", lost)

    def _forget(self) -> None:
        """Remove what counts no more, once a day; what fails is tried again on the next."""
        now = self._clock()
        day, before = int(now // 86_400), self._forgot
        self._forgot = day
        if day != before:
            budgets.forget(self._store.engine, now)

    def _write(self) -> None:
        """Write a batch and count it as stored at once, so that a failed read does not write it again."""
        used, reserved = self._writing
        if used or reserved:
            budgets.add_use(self._store.engine, used, self._batch, self._clock(), Reservations(self._server, reserved))
        with self._lock:
            if self._stored is not None:
                for scope, tokens in used.items():
                    self._stored.used[scope] = self._stored.used.get(scope, 0) + tokens
            self._writing = _Changes({}, {})
