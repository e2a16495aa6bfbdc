"""Decisions that requests got, on their way into the store, to be replayed against a proposal.

Only what a decision depends on is kept, once per distinct question, with a count: never a prompt, and
no name that the client made up. Requests do not wait for the database: questions are counted here and
written in batches. What a process has not written when it is killed is lost.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict, defaultdict
from typing import Final

from flexgate.policies.decision import DecisionRequest
from flexgate.policies.errors import (
    AnchorRequired,
    EmptyGate,
    ExpertDenied,
    ExpertRequired,
    RequiredExpertMissing,
    StoreError,
)
from flexgate.policies.ids import TenantId
from flexgate.policies.simulate import Replay
from flexgate.policies.store.decision_samples import Asked, Question, add_questions, read_questions
from flexgate.policies.store.store import Store

MAX_WAITING_OF_ONE: Final = 50
FLUSH_EVERY_S: Final = 5.0
_ABOUT_LISTED: Final = (AnchorRequired, EmptyGate, ExpertDenied, ExpertRequired, RequiredExpertMissing)
"""Refusals of requests that name nothing but listed experts."""

logger = logging.getLogger(__name__)


class Recorded:
    """Counts questions; `run` writes them. Safe to use from several threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._waiting: dict[TenantId, OrderedDict[Question, tuple[int, float]]] = defaultdict(OrderedDict)

    def add(self, tenant_id: TenantId, request: DecisionRequest, now: float) -> None:
        """Note one decided request; of a tenant's too many the one that was asked longest ago makes way."""
        only = None if request.only is None else _names(request.only)
        question = Question(tenant_id, request.purpose, request.region, only, _names(request.ignore))
        with self._lock:
            waiting = self._waiting[tenant_id]
            times, _ = waiting.pop(question, (0, now))
            waiting[question] = (times + 1, now)
            if len(waiting) > MAX_WAITING_OF_ONE:
                waiting.popitem(last=False)

    def add_refused(self, tenant_id: TenantId, request: DecisionRequest, error: Exception, now: float) -> None:
        """Note a request that was refused, unless it names what is not there or may not be declared."""
        if isinstance(error, _ABOUT_LISTED):
            self.add(tenant_id, request, now)

    def flush(self) -> None:
        """Write what has been counted; raises `StoreError`, and forgets it then. Blocks."""
        with self._lock:
            batch, self._waiting = self._waiting, defaultdict(OrderedDict)
        if batch:
            asked = [Asked(question, *counted) for waiting in batch.values() for question, counted in waiting.items()]
            add_questions(self._store.engine, asked)

    async def run(self) -> None:
        """Write again and again, for ever."""
        while True:
            await asyncio.sleep(FLUSH_EVERY_S)
            await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Write the rest; if that fails, simulations will not know of it."""
        try:
            self.flush()
        except StoreError as error:
            logger.warning("questions are not recorded for simulations: %s", type(error).__name__)


def replays(store: Store, now: float) -> list[Replay]:
    """Every question that was recorded, of all processes, as if it were asked at `now` (Unix seconds)."""
    return [
        Replay(
            question.tenant_id,
            DecisionRequest(
                decision_id="simulate",
                purpose=question.purpose,
                region=question.region,
                only=question.only,
                ignore=question.ignore,
            ),
            now,
            times,
        )
        for question, times, _ in read_questions(store.engine)
    ]


def _names(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(set(names)))
