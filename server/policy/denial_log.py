"""Denied requests on their way into the audit log.

Requests do not wait for the database: they are counted here, by who was denied what, and written in
batches. So a flood of denials costs memory by its kinds, not by its size. How many entries one actor, and
all of them together, may have in a day is bounded: what is beyond waits, counted, for the next entry. Every
denied request is counted in some entry. What cannot be written is kept and tried again.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

from flexgate.policies.audit import DENIED, Event
from flexgate.policies.errors import StoreError

MAX_KINDS: Final = 1024
MAX_KINDS_OF_ONE: Final = 16
"""Of one actor in one batch; what is beyond is counted without its reasons, so that nobody fills the log alone."""
MAX_REQUEST_IDS: Final = 8
BURST_OF_ONE: Final = 64
ENTRY_OF_ONE_EVERY_S: Final = 60.0
"""One actor has at most `BURST_OF_ONE` entries at once, and then one a minute: 1,504 in a day."""
BURST: Final = 2048
ENTRY_EVERY_S: Final = 4.0
"""All actors of one process together: 23,648 in a day."""
FLUSH_EVERY_S: Final = 0.25
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


@dataclass(slots=True)
class _Budget:
    """Entries that may be written: `burst` at once, and one more `every_s` seconds."""

    burst: int
    every_s: float
    spent: float = 0.0
    at: float = 0.0

    def refill(self, now: float) -> bool:
        """Let the time until `now` (seconds of a steady clock) count; whether an entry may be written."""
        self.spent = max(0.0, self.spent - (now - self.at) / self.every_s)
        self.at = now
        return self.spent <= self.burst - 1


class Denials:
    """Counts denials; `run` writes them. Safe to use from several threads."""

    def __init__(
        self, store: Records, *, clock: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock` gives Unix seconds, `steady` those that budgets go by."""
        self._store = store
        self._clock = clock
        self._steady = steady
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._waiting: dict[Denial, _Counted] = {}
        self._kinds: Counter[str] = Counter()  # waiting, by actor
        self._budget = _Budget(BURST, ENTRY_EVERY_S)
        self._budgets: dict[str, _Budget] = {}

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
        """Write what has been counted, as far as the budgets go; raises `StoreError`, and keeps it then. Blocks."""
        self._write(self._within_budget)

    def _write(self, due: Callable[[Denial], bool]) -> None:
        with self._writing:
            with self._lock:
                batch = self._take(due)
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
                    logger.error(
                        "audit entries of denied requests cannot be written and are kept in memory: %s",
                        type(error).__name__,
                    )
                failing = True

    def close(self) -> None:
        """Write the rest at the end of the process, or say how much is lost."""
        try:
            self._write(lambda _: True)
        except StoreError:
            logger.error("%d audit entries of denied requests were lost", self.waiting())

    def _take(self, due: Callable[[Denial], bool]) -> dict[Denial, _Counted]:
        """What is due of what waits, longest first."""
        batch = {denial: counted for denial, counted in self._waiting.items() if due(denial)}
        for denial in batch:
            del self._waiting[denial]
            self._kinds[denial.actor] -= 1
        self._kinds = +self._kinds
        return batch

    def _within_budget(self, denial: Denial) -> bool:
        now = self._steady()
        if denial.actor not in self._budgets and len(self._budgets) >= MAX_KINDS:
            for known in self._budgets.values():
                known.refill(now)
            self._budgets = {actor: known for actor, known in self._budgets.items() if known.spent}
        own = self._budgets.setdefault(denial.actor, _Budget(BURST_OF_ONE, ENTRY_OF_ONE_EVERY_S))
        if not (own.refill(now) and self._budget.refill(now)):
            return False
        own.spent += 1
        self._budget.spent += 1
        return True

    def _merge(self, denial: Denial, counted: _Counted) -> None:
        if denial not in self._waiting:
            if self._kinds[denial.actor] >= MAX_KINDS_OF_ONE:
                denial = denial._replace(param=None, rules=())
            if denial not in self._waiting and len(self._waiting) >= MAX_KINDS:
                denial = Denial(MANY, None, MANY, denial.status, denial.code)
        known = self._waiting.get(denial)
        if known is None:
            self._waiting[denial] = counted
            self._kinds[denial.actor] += 1
        else:
            known.add(counted)


def _event(denial: Denial, counted: _Counted) -> Event:
    detail: dict[str, Any] = denial._asdict()
    del detail["actor"]
    detail["rules"] = [list(rule) for rule in denial.rules]
    detail |= {"requests": counted.requests, "request_ids": counted.request_ids, "last": counted.last}
    return Event(at=counted.first, actor=denial.actor, action=DENIED, detail=detail)
