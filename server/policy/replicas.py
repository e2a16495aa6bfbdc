"""This process among those that decide from the same store, and when all of them have a change."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from sqlalchemy import Engine

from flexgate.policies.errors import StoreError
from flexgate.policies.store import replicas
from flexgate.policies.store.replicas import Process
from flexgate.server.policy.executors import CHANGES, run_in

SEEN_EVERY_S: Final = 60.0
_LOOK_EVERY_S: Final = 0.05

logger = logging.getLogger(__name__)


class Replicas:
    """Announces what this process confirmed. A process that cannot say so is waited for longer."""

    def __init__(self, engine: Engine, *, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._lease_s = lease_s
        self._clock = clock
        self._id = f"{socket.gethostname()[:40]}:{os.getpid()}:{secrets.token_hex(4)}"
        self._announced: int | None = None
        self._seen = -float("inf")

    def announce(self, version: int) -> None:
        """Note a confirmed version; 0 before the first. Blocks. Only the first time may it fail:
        afterwards whoever waits for this process waits until its lease has run out.
        """
        if version == self._announced and self._clock() - self._seen < SEEN_EVERY_S:
            return
        try:
            replicas.announce(self._engine, Process(self._id, version, self._lease_s), at=time.time())
        except StoreError:
            if self._announced is None:
                raise
            logger.warning("this process cannot announce its policy version")
            return
        self._announced, self._seen = version, self._clock()

    def deregister(self) -> None:
        """Remove this process from the replicas; if the store fails, others wait for its lease."""
        with suppress(StoreError):
            replicas.deregister(self._engine, self._id)

    async def everywhere(self, version: int) -> None:
        """Return once no process decides from a policy older than `version` any more."""
        began = self._clock()
        while True:
            behind = await run_in(CHANGES, replicas.behind, self._engine, version)
            waited = self._clock() - began
            if all(process.lease_s <= waited for process in behind):
                return
            await asyncio.sleep(_LOOK_EVERY_S)
