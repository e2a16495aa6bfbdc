"""The live policy: the one immutable snapshot that requests are decided from, as long as it is confirmed.

A snapshot that was not confirmed within its lease is not used: the request asks the store itself, and if that fails,
nothing is decided. An expert is live where the catalogue and the engine agree that it is, so that a decision never
allows an expert without a slot, or one that another process has revoked.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from flexgate.policies.errors import PolicyError, SnapshotStale, VersionNotReached
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.withhold import Withholding
from flexgate.server.policy.executors import run_in

WAIT_FOR_VERSION_S: Final = 1.0


def with_live(snapshot: Snapshot, live: Mapping[str, int]) -> Snapshot:
    """`snapshot` with the experts that its catalogue says are live and that are served, as loaded after any revocation.

    Args:
        live: the experts that are served, each with its slot epoch.
    """
    served = {id_ for id_, slot_epoch in live.items() if slot_epoch >= snapshot.revocation_epochs.get(id_, 0)}
    if all(expert.id in served for expert in snapshot.experts.values() if expert.live):
        return snapshot
    experts = {
        id_: expert.model_copy(update={"live": expert.live and id_ in served})
        for id_, expert in snapshot.experts.items()
    }
    return replace(snapshot, experts=MappingProxyType(experts))


class LivePolicy(ABC):
    """The current snapshot, for requests.

    Attributes:
        stored: the newest snapshot that was read, confirmed or not.
        withheld: what it still permits and this process does not.
    """

    def __init__(
        self, live: Callable[[], Mapping[str, int]], *, lease_s: float, poll_s: float, clock: Callable[[], float]
    ) -> None:
        """`live` gives the experts that the engine serves now, each with its slot epoch."""
        self._live = live
        self._lease_s = lease_s
        self._poll_s = poll_s
        self._clock = clock
        self.stored: Snapshot | None = None
        self.withheld: tuple[Withholding, ...] = ()
        self._reduced: tuple[Snapshot, tuple[Withholding, ...], Snapshot] | None = None
        self._served: tuple[Snapshot, Mapping[str, int], Snapshot] | None = None
        self._confirmed = -float("inf")
        self._asking: asyncio.Task[Snapshot] | None = None
        self._asker = ThreadPoolExecutor(1, "policy-confirm")

    @abstractmethod
    def confirm(self) -> Snapshot:
        """Ask the store whether the snapshot still holds, or for a newer one. Blocks on it."""

    async def current(self, patience: float | None = None) -> Snapshot:
        """The snapshot to decide from; raises `SnapshotStale` when it cannot be confirmed.

        Args:
            patience: seconds in which the store must answer in time; the lease if None.
        """
        deadline = time.monotonic() + (self._lease_s if patience is None else patience)
        while self.stored is None or not self.fresh():
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._ask()
            except TimeoutError as error:
                raise SnapshotStale("the policy store cannot be asked") from error
            except PolicyError as error:
                if patience is None or not isinstance(error, SnapshotStale):
                    raise SnapshotStale("the policy store cannot be asked") from error
        return self._serve(self.stored)

    async def at_least(self, version: int) -> Snapshot:
        """A snapshot of at least `version`, waited for up to a second.

        Raises:
            VersionNotReached: the policy is confirmed, and still older.
            SnapshotStale: the policy cannot be confirmed.
        """
        deadline = self._clock() + WAIT_FOR_VERSION_S
        while True:
            snapshot = await self.current()
            if snapshot.policy_version >= version:
                return snapshot
            if self._clock() >= deadline:
                raise VersionNotReached(version, current=snapshot.policy_version)
            await asyncio.sleep(min(self._poll_s, 0.05))

    def fresh(self) -> bool:
        """Whether the last confirmation is within its lease."""
        return self._clock() - self._confirmed < self._lease_s

    def without_withheld(self, stored: Snapshot) -> Snapshot:
        """What a snapshot permits here: all but what is withheld."""
        withheld, reduced = self.withheld, self._reduced
        if not withheld:
            return stored
        if reduced is None or reduced[0] is not stored or withheld[: len(reduced[1])] != reduced[1]:
            reduced = stored, (), stored
        if reduced[1] is not withheld:
            snapshot = reduced[2]
            for withholding in withheld[len(reduced[1]) :]:
                snapshot = withholding(snapshot)
            reduced = self._reduced = (stored, withheld, snapshot)
        return reduced[2]

    async def _ask(self) -> Snapshot:
        """Confirm once for all who ask meanwhile: a store that hangs holds one thread, not many."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(run_in(self._asker, self.confirm))
            self._asking.add_done_callback(lambda task: task.cancelled() or task.exception())
        snapshot = await asyncio.shield(self._asking)
        if not self.fresh():
            raise SnapshotStale("the policy store answered too late")
        return snapshot

    def _serve(self, newest: Snapshot) -> Snapshot:
        stored, live = self.without_withheld(newest), self._live()
        served = self._served
        if served is None or served[0] is not stored or served[1] != live:
            served = self._served = (stored, live, with_live(stored, live))
        return served[2]
