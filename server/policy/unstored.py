"""Rights that were taken away while the store could not take the change: withheld at once, and stored once it can.

A disk may be full beyond its reserve, or a database read-only. The right is gone from this process from the first try
on; other processes, and a restart before the change was stored, do not know of it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Final, NamedTuple

from flexgate.policies.errors import PolicyError, StoreUnavailable
from flexgate.policies.withhold import Withholding
from flexgate.server.policy.executors import CHANGES, run_in
from flexgate.server.policy.source import PolicySource

RETRY_SECONDS: Final = 1.0

logger = logging.getLogger(__name__)


class _Change(NamedTuple):
    name: tuple[str, ...]
    withholding: Withholding
    store: Callable[[], object]


class Unstored:
    """The changes of this process that wait for the store; `run` stores them."""

    def __init__(self, policy: PolicySource) -> None:
        self._policy = policy
        self._lock = threading.Lock()
        self._changes: dict[tuple[str, ...], _Change] = {}

    def add(self, name: tuple[str, ...], withholding: Withholding, store: Callable[[], object]) -> bool:
        """Withhold a right from now on, and end what runs on it; `store` makes the change. Blocks.

        Args:
            name: of the change; one that waits under the same name is given up for this one.

        Returns:
            Whether the change waits now. One that takes nothing away from the stored policy does not, so that no more
            can wait than there are rights.
        """
        if not self._policy.gives(withholding):
            return False
        with self._lock:
            former = self._changes.pop(name, None)
            self._changes[name] = _Change(name, withholding, store)
            self._policy.withhold(withholding, None if former is None else former.withholding)
        self._policy.enforce_withheld()
        if former is None:
            logger.error("%s cannot be stored; this server enforces it and tries again", " ".join(name))
        return True

    def waiting(self) -> int:
        """How many changes are not stored yet."""
        return len(self._changes)

    def try_again(self) -> None:
        """Store what can be stored now, oldest first. Blocks."""
        for change in tuple(self._changes.values()):
            try:
                change.store()
            except StoreUnavailable:
                return
            except PolicyError as error:
                logger.error("%s is refused by the store: %s", " ".join(change.name), error)
            else:
                logger.info("%s is stored", " ".join(change.name))
            self._policy.confirm()  # the snapshot says it by itself before it is withheld no longer
            with self._lock:
                if self._changes.get(change.name) is change:  # else another one waits in its place
                    del self._changes[change.name]
                    self._policy.release(change.withholding)

    async def run(self) -> None:
        """Try again and again, for ever."""
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            if self._changes:
                try:
                    await run_in(CHANGES, self.try_again)
                except PolicyError as error:
                    logger.error("the policy database does not answer: %s", error)
