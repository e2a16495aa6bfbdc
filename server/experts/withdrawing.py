"""Withdrawing an expert: no more gates, commit, the engine ends who may use it, zeros read back.

When the record is there, no token can come of the expert any more: what was being sent is sent, its
KV cache is unreachable and evicted, its weights are zero on every rank, and no restart loads it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from flexgate.policies.errors import PolicyError
from flexgate.policies.terms import PUBLIC
from flexgate.server.engine.client import ExpertInfo, GatedCall
from flexgate.server.experts.errors import ChangeConflict, EngineFailed, NotResident
from flexgate.server.experts.residence import Residence

DELIVERY_SECONDS: Final = 2.0
"""How long it waits for clients that read slowly; what is on the wire then is out of its hands."""
DRAIN_POLL_SECONDS: Final = 0.05

Record = Callable[[str, str, dict[str, Any]], None]
"""Writes (actor, action, detail) to the audit log. Blocks."""

logger = logging.getLogger(__name__)


class Withdrawing:
    """The steps of one withdrawal. The residence's lock is the caller's to hold."""

    def __init__(
        self,
        residence: Residence,
        *,
        confirm: Callable[[], object],
        record: Record,
        clock: Callable[[], float],
    ) -> None:
        """`confirm` refreshes the policy snapshot. Blocks."""
        self._residence = residence
        self._confirm = confirm
        self._record = record
        self._clock = clock

    def resident(self, expert: str) -> ExpertInfo:
        """A loaded expert that can be withdrawn; raises `NotResident`."""
        info = self._residence.find(expert)
        if info is None or expert == PUBLIC:
            raise NotResident("No expert of that name is loaded that could be withdrawn.")
        return info

    async def revoke(self, expert: str, *, actor: str) -> dict[str, Any]:
        """Withdraw an expert for good; returns the record.

        Raises:
            NotResident: it is not loaded.
            ChangeConflict: the store refused; nothing was changed.
            EngineFailed: it is withdrawn, and a rank could not prove that it is gone.
        """
        began, residence = self._clock(), self._residence
        info = self.resident(expert)
        before = residence.client.experts()
        residence.client.publish(residence.others(expert), residence.client.weights_epoch)
        try:
            epoch = await asyncio.to_thread(self._commit, info, actor)
        except PolicyError as error:
            residence.client.publish(before, residence.client.weights_epoch)
            raise ChangeConflict(f"The store refused the change: {error}.", code="store_refused") from error
        return await self._take_out(info, self._stop(info), epoch, actor=actor, began=began)

    async def obey(self, info: ExpertInfo) -> None:
        """Take out an expert that another process on the same store has withdrawn."""
        residence, began = self._residence, self._clock()
        withdrawn = await asyncio.to_thread(residence.repository.withdrawn)
        if info.id in withdrawn and residence.find(info.id) == info:
            epoch = await asyncio.to_thread(residence.repository.epoch)
            residence.client.publish(residence.others(info.id), epoch)
            await self._take_out(info, self._stop(info), epoch, actor="another process", began=began)

    async def drained(self, info: ExpertInfo, seconds: float) -> None:
        """Wait until nobody uses a slot, no longer than `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and await self._residence.slots.users(info.slot):
            await asyncio.sleep(DRAIN_POLL_SECONDS)

    def _stop(self, info: ExpertInfo) -> tuple[GatedCall, ...]:
        """Give no more tokens to whoever may use the expert, in this version or a former one."""
        tenancies = (info, *self._residence.retiring.get(info.id, ()))
        return tuple(call for each in tenancies for call in self._residence.client.withdraw(each.lease))

    def _commit(self, info: ExpertInfo, actor: str) -> int:
        repository, before = self._residence.repository, self._residence.repository.epoch()
        try:
            return repository.revoke(info.id, info.slot, actor=actor, at=self._clock())
        except PolicyError:
            if info.id in repository.withdrawn() and repository.epoch() > before:
                return repository.epoch()  # it was committed, and the answer was lost
            raise

    async def _take_out(
        self, info: ExpertInfo, users: Sequence[GatedCall], epoch: int, *, actor: str, began: float
    ) -> dict[str, Any]:
        residence = self._residence
        residence.soil(info.slot)
        residence.client.publish(residence.client.experts(), epoch)
        tenancies = (info, *residence.retiring.pop(info.id, ()))
        try:
            closed = [await residence.slots.close(each.slot) for each in tenancies]
            undelivered = await _undelivered(users)
            digests = [await residence.clear(each.slot) for each in tenancies]
        except Exception as error:
            raise EngineFailed(
                f"Expert '{info.id}' is withdrawn and no restart loads it, but the engine failed: {error}. Restart it."
            ) from error
        await self._tidy(residence.forget_copies(), asyncio.to_thread(self._confirm))
        record = {
            "object": "expert.revocation",
            "expert": info.id,
            "slot": info.slot,
            "generation": info.generation,
            "weights_epoch": epoch,
            "aborted_requests": len(users),
            "evicted_blocks": sum(one.evicted_blocks for one in closed),
            "undelivered_responses": undelivered,
            "digests": digests[0],
            "requested_at": began,
            "effective_at": self._clock(),
        }
        await self._tidy(asyncio.to_thread(self._record, actor, "weights.cleared", record))
        logger.info("expert %s is withdrawn from slot %d", info.id, info.slot)
        return record

    async def _tidy(self, *steps: Awaitable[object]) -> None:
        """What follows once the expert is gone; a store or a disk that fails now does not bring it back."""
        for error in await asyncio.gather(*steps, return_exceptions=True):
            if isinstance(error, (PolicyError, OSError)):
                logger.error("after a withdrawal: %s", error)
            elif isinstance(error, BaseException):
                raise error


async def _undelivered(users: Sequence[GatedCall]) -> int:
    """Wait until nothing of these calls' answers is left to send; how many were not done at the end."""
    waiting = [asyncio.ensure_future(call.ended.wait()) for call in users if not call.ended.is_set()]
    if not waiting:
        return 0
    _, late = await asyncio.wait(waiting, timeout=DELIVERY_SECONDS)
    for task in late:
        task.cancel()
    return len(late)
