"""Decisions that requests got, on their way into the store, to be replayed against a proposal.

Only what a decision depends on is kept, once per distinct sample, with a count: never a prompt, and
no name that the client made up. Requests do not wait for the database: samples are counted here and
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
    EmptyGate,
    ExpertDenied,
    ExpertRequired,
    GradeTooLow,
    LayerWithoutExpert,
    RequiredExpertMissing,
    StoreError,
)
from flexgate.policies.ids import TenantId
from flexgate.policies.store.decision_samples import CountedSample, DecisionSample, add_samples
from flexgate.policies.store.store import Store

MAX_WAITING_OF_ONE: Final = 50
FLUSH_EVERY_S: Final = 5.0
_ABOUT_LISTED: Final = (EmptyGate, ExpertDenied, ExpertRequired, GradeTooLow, LayerWithoutExpert, RequiredExpertMissing)
"""Refusals of requests that name nothing but listed experts."""

logger = logging.getLogger(__name__)


class DecisionSamples:
    """Counts samples; `run` writes them. Safe to use from several threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._waiting: dict[TenantId, OrderedDict[DecisionSample, tuple[int, float]]] = defaultdict(OrderedDict)

    def add(self, tenant_id: TenantId, request: DecisionRequest, now: float) -> None:
        """Note one decided request; of a tenant's too many the one that was asked longest ago makes way."""
        only = None if request.only is None else _names(request.only)
        sample = DecisionSample(tenant_id, request.purpose, request.region, only, _names(request.ignore))
        with self._lock:
            waiting = self._waiting[tenant_id]
            times, _ = waiting.pop(sample, (0, now))
            waiting[sample] = (times + 1, now)
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
            counted = [CountedSample(one, *count) for waiting in batch.values() for one, count in waiting.items()]
            add_samples(self._store.engine, counted)

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
            logger.warning("decision samples could not be stored: %s", type(error).__name__)


def _names(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(set(names)))
