"""The server's side of the process that tries constraints: a few at a time, one of each tenant, remembered for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, defaultdict
from hashlib import sha256
from typing import Any, Final, TypeVar

from flexgate.server.engine.frontend.constraints.errors import ConstraintError
from flexgate.server.engine.frontend.constraints.made import Constraint
from flexgate.server.engine.frontend.constraints.trials import Trials

logger = logging.getLogger(__name__)

T = TypeVar("T")
MAX_AT_ONCE: Final = 2
MAX_WAITING: Final = 16
"""Of one tenant's constraints that are not tried yet."""
MAX_REMEMBERED: Final = 256
"""Of one tenant's constraints that were compiled within the limits, and of those that were slow later."""
AVOIDED_SECONDS: Final = 600.0


class CompilerBusy(Exception):
    """A constraint could not be tried now: too many of its tenant wait, or the process ended. Later it may be."""


class Compiler:
    """Compiles constraints in a process of their own, to see that they can be; begin it with :meth:`start`."""

    def __init__(self) -> None:
        self._trials: Trials | None = None
        self._starting = asyncio.Lock()
        self._tokenizer = ""
        self._all = asyncio.Semaphore(MAX_AT_ONCE)
        self._of_tenant: dict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(1))
        self._running: dict[str, dict[bytes, asyncio.Task[None]]] = defaultdict(dict)
        self._known: dict[str, OrderedDict[bytes, None]] = defaultdict(OrderedDict)
        self._slow: dict[str, OrderedDict[bytes, float]] = defaultdict(OrderedDict)

    async def start(self, tokenizer: str) -> None:
        """Begin the process; ``tokenizer`` is xgrammar's serialised `TokenizerInfo`."""
        self._tokenizer = tokenizer
        self._trials = await Trials.begin(tokenizer)

    async def stop(self) -> None:
        """End the process."""
        if self._trials is not None:
            await self._trials.stop()

    async def check(self, tenant: str, constraint: Constraint) -> None:
        """Let the process compile a constraint, unless it did for this tenant.

        Raises:
            ConstraintError: it cannot be compiled and followed within the limits; the message says why.
            CompilerBusy: it could not be tried now.
        """
        name, known = _name(constraint), self._known[tenant]
        if self._is_avoided(tenant, name):
            raise ConstraintError("it took too long to follow; simplify it")
        if name in known:
            known.move_to_end(name)
            return
        running = self._running[tenant]
        if name not in running:
            if len(running) >= MAX_WAITING:
                raise CompilerBusy("too many new constraints of this tenant are waiting")
            task = running[name] = asyncio.create_task(self._try(tenant, constraint))
            task.add_done_callback(lambda done: self._ended(tenant, name, done))
        await asyncio.shield(running[name])

    def avoid(self, tenant: str, constraint: Constraint) -> None:
        """Refuse a constraint of a tenant for a while: it was quick when it was tried, and slow to follow."""
        name, slow = _name(constraint), self._slow[tenant]
        self._known[tenant].pop(name, None)
        _remember(slow, name, time.monotonic() + AVOIDED_SECONDS)

    def _is_avoided(self, tenant: str, name: bytes) -> bool:
        return tenant in self._slow and self._slow[tenant].get(name, 0.0) > time.monotonic()

    async def _try(self, tenant: str, constraint: Constraint) -> None:
        async with self._of_tenant[tenant], self._all:
            answer = await self._ask({"kind": constraint.kind, "text": constraint.text})
        if "busy" in answer:
            logger.warning("a constraint could not be tried: %s", answer["busy"])
            raise CompilerBusy(answer["busy"])
        if "refused" in answer:
            raise ConstraintError(answer["refused"])

    def _ended(self, tenant: str, name: bytes, task: asyncio.Task[None]) -> None:
        del self._running[tenant][name]
        if not task.cancelled() and task.exception() is None:
            _remember(self._known[tenant], name, None)
        if not self._running[tenant]:
            del self._running[tenant], self._of_tenant[tenant]

    async def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        async with self._starting:
            if self._trials is None or not self._trials.alive:
                try:
                    self._trials = await Trials.begin(self._tokenizer)
                except OSError as error:
                    return {"busy": f"the process that compiles constraints cannot be started: {error}"}
            trials = self._trials
        return await trials.ask(job)


def _remember(found: OrderedDict[bytes, T], name: bytes, value: T) -> None:
    """The newest so many."""
    found[name] = value
    found.move_to_end(name)
    if len(found) > MAX_REMEMBERED:
        found.popitem(last=False)


def _name(constraint: Constraint) -> bytes:
    return sha256(f"{constraint.kind}\0{constraint.text}".encode()).digest()
