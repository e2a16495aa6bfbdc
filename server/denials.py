"""Denied requests on their way into the audit log.

Requests do not wait for the database: they are counted here, by who was denied what, and written in
batches. So a flood of denials costs memory and log entries by its kinds, not by its size, and every
denied request is counted in some entry. What cannot be written is kept and tried again.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

from flexgate.policies.audit import Event
from flexgate.policies.errors import StoreError

MAX_KINDS: Final = 1024
MAX_KINDS_OF_ONE: Final = 16
"""Of one actor in one batch; what is beyond is counted without its reasons, so that nobody fills the log alone."""
MAX_REQUEST_IDS: Final = 8
FLUSH_EVERY_S: Final = 0.25
ACTION: Final = "request.denied"
ANONYMOUS: Final = "anonymous"
MANY: Final = "many"

logger = logging.getLogger(__name__)


class Records(Protocol):
    """What is asked of the store."""

    def record(self, events: list[Event]) -> object: ...


class Denial(NamedTuple):
    """What is the same for all requests of one entry. `rules` are (expert, code, rule) of each reason."""

    actor: str
    tenant_id: str | None
    route: str
    status: int
    code: str | None
    param: str | None = None
    rules: tuple[tuple[str, str, str], ...] = ()


@dataclass(slots=True)
class _Counted:
    first: float
    last: float
    requests: int = 0
    request_ids: list[str] = field(default_factory=list)

    def add(self, other: _Counted) -> None:
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)
        self.requests += other.requests
        self.request_ids = (self.request_ids + other.request_ids)[:MAX_REQUEST_IDS]


class Denials:
    """Counts denials; `run` writes them. Safe to use from several threads."""

    def __init__(self, store: Records, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._waiting: dict[Denial, _Counted] = {}

    def add(self, denial: Denial, request_id: str) -> None:
        """Count one denied request."""
        now = self._clock()
        with self._lock:
            self._merge(denial, _Counted(now, now, 1, [request_id]))

    def waiting(self) -> int:
        """Denied requests that are not in the audit log yet."""
        with self._lock:
            return sum(counted.requests for counted in self._waiting.values())

    def flush(self) -> None:
        """Write what has been counted; raises `StoreError`, and keeps it then. Blocks."""
        with self._writing:
            with self._lock:
                batch, self._waiting = self._waiting, {}
            if not batch:
                return
            try:
                self._store.record([_event(denial, counted) for denial, counted in batch.items()])
            except StoreError:
                with self._lock:
                    for denial, counted in batch.items():
                        self._merge(denial, counted)
                raise

    async def run(self) -> None:
        """Write again and again, for ever."""
        failing = False
        while True:
            await asyncio.sleep(FLUSH_EVERY_S)
            try:
                await asyncio.to_thread(self.flush)
                failing = False
            except StoreError as error:
                if not failing:
                    logger.error("denied requests wait for the audit log: %s", type(error).__name__)
                failing = True

    def close(self) -> None:
        """Write the rest at the end of the process, or say how much is lost."""
        try:
            self.flush()
        except StoreError:
            logger.error("%d denied requests could not be written to the audit log", self.waiting())

    def _merge(self, denial: Denial, counted: _Counted) -> None:
        if denial not in self._waiting:
            if sum(other.actor == denial.actor for other in self._waiting) >= MAX_KINDS_OF_ONE:
                denial = denial._replace(param=None, rules=())
            if denial not in self._waiting and len(self._waiting) >= MAX_KINDS:
                denial = Denial(MANY, None, MANY, denial.status, denial.code)
        known = self._waiting.get(denial)
        if known is None:
            self._waiting[denial] = counted
        else:
            known.add(counted)


def _event(denial: Denial, counted: _Counted) -> Event:
    detail: dict[str, Any] = denial._asdict()
    del detail["actor"]
    detail["rules"] = [list(rule) for rule in denial.rules]
    detail |= {"requests": counted.requests, "request_ids": counted.request_ids, "last": counted.last}
    return Event(at=counted.first, actor=denial.actor, action=ACTION, detail=detail)
