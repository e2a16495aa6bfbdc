"""Keep the live policy confirmed: poll the store, take newer snapshots, and end what they no longer permit.

The store is asked at every poll, and at once when it notifies of a change; what changed is read, and a new snapshot
takes the place of the old one as a whole.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final, Protocol

from flexgate.policies.errors import SnapshotStale, StoreReplaced
from flexgate.policies.ids import ExpertId
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.withhold import Withholding
from flexgate.server.policy.executors import CHANGES, run_in
from flexgate.server.policy.live import LivePolicy
from flexgate.server.policy.replicas import Replicas
from flexgate.server.policy.rollback_guard import RollbackGuard

LAST_TRY_S: Final = 0.5
"""How long the store is asked once more before what runs is ended: an event loop that was held up lost no store."""

logger = logging.getLogger(__name__)


class Confirms(Protocol):
    """What is asked of a policy store: `known` again, or a newer snapshot, never an older one."""

    def confirm(self, known: Snapshot | None) -> Snapshot: ...


class ChangeNotifications(Protocol):
    """Waits for news of a change. It may miss one, and never fails."""

    def wait(self, seconds: float) -> None: ...
    def close(self) -> None: ...


class PolicySource(LivePolicy):
    """The live policy, which `run` keeps confirmed."""

    def __init__(
        self,
        store: Confirms,
        live: Callable[[], Mapping[str, int]],
        *,
        lease_s: float,
        poll_s: float,
        clock: Callable[[], float] = time.monotonic,
        replicas: Replicas | None = None,
        notifications: ChangeNotifications | None = None,
        rollback_guard: RollbackGuard | None = None,
        require_files: Callable[[], None] = lambda: None,
    ) -> None:
        """Args:
        live: gives the experts that the engine serves now, each with its slot epoch.
        replicas: where the confirmed version is announced.
        notifications: end the wait between two polls early.
        rollback_guard: keeps the confirmed version for the next start.
        require_files: raises `StoreReplaced` when the server's files are not those of its start.
        """
        super().__init__(live, lease_s=lease_s, poll_s=poll_s, clock=clock)
        self._store = store
        self._replicas = replicas
        self._notifications = notifications
        self._rollback_guard = rollback_guard
        self._require_files = require_files
        self._enforce: Callable[[Snapshot], None] | None = None
        self._expire: Callable[[], None] | None = None
        self._withholding = threading.Lock()
        self._enforced: Snapshot | None = None
        self._confirming = threading.Lock()

    def enforce_with(self, enforce: Callable[[Snapshot], None]) -> None:
        """End what a newer policy permits no more by `enforce`, before the version is announced. It may block."""
        self._enforce = enforce

    def expire_with(self, expire: Callable[[], None]) -> None:
        """End what runs by `expire` once the snapshot's lease has run out; see `watch_lease`."""
        self._expire = expire

    def confirm(self) -> Snapshot:
        """Ask the store whether the snapshot still holds, or for a newer one. Blocks on it."""
        with self._confirming:  # else a slow answer could replace a newer one
            if self._replicas is not None and self.stored is None:
                self._replicas.announce(0)
            began, before = self._clock(), self.stored
            try:
                self._require_files()
                self.stored = self._store.confirm(before)
            except StoreReplaced:
                self._confirmed = -float("inf")  # what was confirmed came from something that is not there any more
                raise
            self._confirmed = began
            if self._rollback_guard is not None and (self.stored is not before or not self._rollback_guard.kept()):
                self._rollback_guard.note(self.stored)
            if self._enforce is not None and self.stored is not self._enforced:
                self._enforce(self.without_withheld(self.stored))
                self._enforced = self.stored
            if self._replicas is not None:
                self._replicas.announce(self.stored.policy_version)
            return self._serve(self.stored)

    def gives(self, withholding: Withholding) -> bool:
        """Whether the stored policy gives what a withholding takes away. Blocks."""
        return self.stored is None or withholding(self.stored) is not self.stored

    def withhold(self, withholding: Withholding, instead_of: Withholding | None = None) -> None:
        """Take a right out of every snapshot from now on.

        Args:
            instead_of: an earlier withholding, left to the store from now on.
        """
        with self._withholding:
            self.withheld = (*(other for other in self.withheld if other is not instead_of), withholding)

    def enforce_withheld(self) -> None:
        """End what runs on a right that is withheld. Blocks until that has ended."""
        if self._enforce is not None and self.stored is not None:
            self._enforce(self.without_withheld(self.stored))

    def release(self, withholding: Withholding) -> None:
        """Leave to the store what a right is, as before `withhold`."""
        with self._withholding:
            self.withheld = tuple(other for other in self.withheld if other is not withholding)

    async def everywhere(self, version: int) -> None:
        """Return once no process decides from an older policy than `version`."""
        if self._replicas is not None:
            await self._replicas.everywhere(version)

    def deregister(self) -> None:
        """Deregister this process from its replicas, and listen no more."""
        if self._notifications is not None:
            self._notifications.close()
        if self._replicas is not None:
            self._replicas.deregister()

    async def run(self) -> None:
        """Confirm at every poll until this is cancelled, in a thread of its own: no load on the loop is waited for."""
        stop = threading.Event()
        poller = threading.Thread(target=self._poll, args=(stop,), name="policy", daemon=True)
        poller.start()
        try:
            await asyncio.Event().wait()
        finally:
            stop.set()
            await run_in(CHANGES, poller.join, self._lease_s)  # a store that hangs is not waited for

    def _poll(self, stop: threading.Event) -> None:
        """A store that fails is asked again."""
        failing = False
        while not stop.is_set():
            try:
                self.confirm()
                failing = False
            except Exception as error:  # whatever it is, who polls must not end
                if not failing:
                    logger.error("the policy database does not answer: %s", error)
                failing = True
            if self._notifications is None:
                stop.wait(self._poll_s)
            else:
                self._notifications.wait(self._poll_s)

    async def watch_lease(self) -> None:
        """End what runs on a snapshot that cannot be confirmed any more, for ever; later than its lease and a poll by
        `LAST_TRY_S` at most.
        """
        while True:
            await asyncio.sleep(self._poll_s)
            if self.stored is not None and self._expire is not None and not await self._fresh_again():
                self._expire()

    async def _fresh_again(self) -> bool:
        """Whether the lease holds, if need be after asking once more."""
        with suppress(Exception):  # whatever it is, what watches must not end
            async with asyncio.timeout(LAST_TRY_S):
                while not self.fresh():
                    with suppress(SnapshotStale):
                        await self._ask()
        return self.fresh()

    def revoked(self, expert: str, slot_epoch: int) -> bool:
        """Whether the store says that an expert, as it was loaded then, must not be served."""
        if self.stored is None:
            return False
        known = self.stored.experts.get(ExpertId(expert))
        return (known is not None and not known.live) or self.stored.revocation_epochs.get(expert, 0) > slot_epoch
