"""Revoke an expert: no more gates, commit, end its requests, clear its slot and read the zeros back.

When the record is there, no token can come of the expert any more: what was being sent is sent, its
KV cache is unreachable and evicted, its weights are zero on every rank, and no restart loads it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from flexgate.policies.errors import PolicyError, StoreUnavailable
from flexgate.server.engine.frontend.calls import ExpertInfo, ExpertSlotRef, GatedCall
from flexgate.server.experts.errors import ChangeConflict, EngineFailed, NotLoaded, NotStored
from flexgate.server.experts.slot_pool import SlotPool
from flexgate.server.policy.executors import CHANGES, run_in

DELIVERY_SECONDS: Final = 2.0
"""How long it waits for clients that read slowly; what is on the wire then is out of its hands."""
DRAIN_POLL_SECONDS: Final = 0.05
MOST_UNSERVED: Final = 100
"""Projects that are named when an expert is revoked that their requests must use."""
ANOTHER_PROCESS: Final = "another process"

Record = Callable[[str, str, dict[str, Any]], None]
"""Writes (actor, action, detail) to the audit log. Blocks."""

logger = logging.getLogger(__name__)


@dataclass
class Revocation:
    """The record of a revocation, for its owner. Times are Unix seconds.

    `digests` are the cleared slot's, one of each rank; none if the expert was not loaded.
    """

    expert: str
    slot: int
    slot_epoch: int
    weights_epoch: int
    requested_at: float
    aborted_requests: int = 0
    evicted_blocks: int = 0
    undelivered_responses: int = 0
    digests: list[str] = field(default_factory=list)


class Revoker:
    """The steps of one revocation. The caller holds the pool's lock."""

    def __init__(
        self,
        pool: SlotPool,
        *,
        confirm: Callable[[], object],
        record: Record,
        needing: Callable[[str], Sequence[str]],
        clock: Callable[[], float],
    ) -> None:
        """`confirm` refreshes the policy snapshot; `needing` names the projects whose requests must use an expert. Both
        block.
        """
        self._pool = pool
        self._confirm = confirm
        self._record = record
        self._needing = needing
        self._clock = clock
        self._doubtful: set[ExpertSlotRef] = set()  # may have been revoked in the store

    async def revoke(self, expert: str, *, actor: str) -> dict[str, Any]:
        """Revoke an expert for good; returns the record.

        Raises:
            NotLoaded: it is not loaded, nor would a start load it.
            ChangeConflict: the store refused, and nothing was changed.
            NotStored: no gate is sealed for the expert any more and its users are ended; it is still loaded.
            EngineFailed: it is revoked, and a rank could not prove that it is gone.
        """
        began, pool = self._clock(), self._pool
        info = pool.find(expert)
        if info is None:
            return await self._forget(expert, actor=actor, began=began)
        self._publish(replace(info, live=False))  # it keeps its slot until it is known to be revoked
        try:
            epoch = await run_in(CHANGES, self._commit, info.id, info.slot, actor)
        except StoreUnavailable as error:
            self._doubtful.add(info.ref)
            self._stop(info)
            raise NotStored(error) from error
        except PolicyError as error:
            self._publish(info)
            raise ChangeConflict(f"The store refused the change: {error}.", code="store_refused") from error
        return await self._unload(info, self._stop(info), epoch, actor=actor, began=began)

    async def follow_revocation(self, info: ExpertInfo) -> None:
        """Unload an expert that another process on the same store has revoked."""
        pool, began = self._pool, self._clock()
        revoked = await run_in(CHANGES, pool.repository.revocation_epochs)
        if revoked.get(info.id, 0) > info.slot_epoch and pool.find(info.id) == info:
            epoch = await run_in(CHANGES, pool.repository.epoch)
            await self._unload(info, self._stop(info), epoch, actor=ANOTHER_PROCESS, began=began)

    async def drained(self, info: ExpertInfo, seconds: float) -> None:
        """Wait until no request uses an expert, at most `seconds`."""
        pool, deadline = self._pool, time.monotonic() + seconds
        while time.monotonic() < deadline and (pool.client.in_use(info.ref) or await pool.slots.users(info.slot)):
            await asyncio.sleep(DRAIN_POLL_SECONDS)

    def _stop(self, info: ExpertInfo) -> tuple[GatedCall, ...]:
        """End the requests that may use the expert, in this version or a former one."""
        assignments = (info, *self._pool.retiring.get(info.id, ()))
        return tuple(call for each in assignments for call in self._pool.client.revoke(each.ref))

    def wake(self, expert: str) -> None:
        """Seal gates again for an expert whose revocation was refused after a drain, unless it may be revoked."""
        info = self._pool.find(expert)
        if info is not None and info.ref not in self._doubtful:
            self._publish(replace(info, live=True))

    def _publish(self, info: ExpertInfo) -> None:
        client = self._pool.client
        client.publish((*self._pool.others(info.id), info), client.weights_epoch)

    async def _forget(self, expert: str, *, actor: str, began: float) -> dict[str, Any]:
        """Revoke an expert that is not loaded here, but that a restart would load."""
        pool = self._pool
        try:
            entry = next((e for e in await run_in(CHANGES, pool.repository.added) if e.expert == expert), None)
            if entry is None:
                raise NotLoaded("No expert of that name is loaded. GET /v1/experts lists the loaded ones.")
            epoch = await run_in(CHANGES, self._commit, expert, entry.slot, actor)
        except PolicyError as error:
            raise ChangeConflict(f"The store refused the change: {error}.", code="store_refused") from error
        pool.client.publish(pool.client.experts(), epoch)
        pool.release_package(entry.package)
        return await self._finish(Revocation(expert, entry.slot, entry.slot_epoch, epoch, began), actor)

    def _commit(self, expert: str, slot: int, actor: str) -> int:
        repository = self._pool.repository
        repository.epoch()  # a store that cannot be asked now has not been told either
        try:
            return repository.revoke(expert, slot, actor=actor, at=self._clock())
        except PolicyError as error:
            try:
                revoked, epoch = repository.revoked(), repository.epoch()
            except PolicyError:
                raise StoreUnavailable(str(error)) from error
            if expert in revoked:
                return epoch  # it was committed, and the answer was lost, now or before
            raise

    async def _unload(
        self, info: ExpertInfo, users: Sequence[GatedCall], epoch: int, *, actor: str, began: float
    ) -> dict[str, Any]:
        pool = self._pool
        pool.mark_dirty(info.slot)
        pool.client.publish(pool.others(info.id), epoch)
        assignments = (info, *pool.retiring.pop(info.id, ()))
        try:
            closed = [await pool.slots.close(each.slot) for each in assignments]
            undelivered = await _undelivered(users)
            digests = [await pool.clear(each.slot) for each in assignments]
        except Exception as error:
            raise EngineFailed(
                f"Expert '{info.id}' is revoked and no restart loads it, but its slot could not be cleared: {error}. "
                "Restart the server."
            ) from error
        done = Revocation(info.id, info.slot, info.slot_epoch, epoch, began)
        done.aborted_requests = len(users)
        done.evicted_blocks = sum(one.evicted_blocks for one in closed)
        done.undelivered_responses = undelivered
        done.digests = digests[0]
        return await self._finish(done, actor)

    async def _finish(self, done: Revocation, actor: str) -> dict[str, Any]:
        """Once the engine has nothing of the expert: confirm the policy, keep the record, have its copy removed."""
        await self._tidy(self._pool.forget_copies(), run_in(CHANGES, self._confirm))
        record = {"object": "expert.revocation", **asdict(done), "effective_at": self._clock()}
        cleared = run_in(CHANGES, self._record, actor, "weights.cleared", record)
        await self._tidy(cleared, run_in(CHANGES, self._note_unserved, done, actor))
        logger.info("expert %s is revoked from slot %d", done.expert, done.slot)
        return record

    def _note_unserved(self, done: Revocation, actor: str) -> None:
        """Log and audit the projects that are not served any more; another process does so for what it revoked."""
        if not (projects := self._needing(done.expert)):
            return
        named = list(projects[:MOST_UNSERVED])
        logger.warning(
            "expert %s is revoked, and %d projects whose requests must use it are not served: %s",
            *(done.expert, len(projects), ", ".join(named)),
        )
        if actor != ANOTHER_PROCESS:
            detail = {"id": done.expert, "weights_epoch": done.weights_epoch, "total": len(projects), "projects": named}
            self._record(actor, "expert.unserved", detail)

    async def _tidy(self, *steps: Awaitable[object]) -> None:
        """Run the steps after a completed revocation; their failures are only logged."""
        for error in await asyncio.gather(*steps, return_exceptions=True):
            if isinstance(error, (PolicyError, OSError)):
                logger.error("after a revocation: %s", error)
            elif isinstance(error, BaseException):
                raise error


async def _undelivered(users: Sequence[GatedCall]) -> int:
    """Wait until these calls' responses are sent; returns how many were not at the deadline."""
    waiting = [asyncio.ensure_future(call.ended.wait()) for call in users if not call.ended.is_set()]
    if not waiting:
        return 0
    _, late = await asyncio.wait(waiting, timeout=DELIVERY_SECONDS)
    for task in late:
        task.cancel()
    return len(late)
