"""Adding an expert: private copy, checks, masked slot on every rank, canary, commit, publish.

Whatever fails before the commit leaves the slot zeroed and nothing else behind; what was committed
is what a restart comes back to, and nothing undoes it. Where the store does not say whether it took the
change, the private copy stays for the restart and the slot stays empty. A server that is stopped in the middle undoes
nothing either: its memory is gone, and the next start removes copies that were not committed.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from flexgate.experts.errors import DiskFull, ExpertsError
from flexgate.experts.package.manifest import Manifest
from flexgate.experts.package.verify import VerifiedPackage, open_package
from flexgate.policies.errors import PolicyError
from flexgate.server.engine.frontend.calls import ExpertInfo, ExpertSlotRef
from flexgate.server.engine.frontend.canary import CanaryNotScheduled
from flexgate.server.experts.errors import ChangeConflict, CommitUnknown, EngineBusy, EngineFailed, PackageRefused
from flexgate.server.experts.jobs import Job
from flexgate.server.experts.repository import Added
from flexgate.server.experts.slot_pool import SlotPool
from flexgate.server.experts.uploads import FREE_BYTES
from flexgate.server.experts.versions import UNSAID, is_set_aside

Canary = Callable[[ExpertSlotRef, ExpertSlotRef], Awaitable[None]]
"""Tries the public expert and a new one; raises when the engine misbehaves or, in a way of its own, has no place."""

_CHECKS: Final = ThreadPoolExecutor(2, "packages")
"""A package takes minutes to copy and check: the threads that confirm the policy and commit revocations stay free."""

logger = logging.getLogger(__name__)


class Loader:
    """The steps of one job. Only the last ones, which change what is served, hold the pool's lock, so that a revocation
    never waits for a package to be loaded or tested.
    """

    def __init__(
        self,
        pool: SlotPool,
        *,
        canary: Canary,
        confirm: Callable[[], object],
        clock: Callable[[], float],
    ) -> None:
        """`confirm` refreshes the policy snapshot. Blocks."""
        self._pool = pool
        self._canary = canary
        self._confirm = confirm
        self._clock = clock

    async def add(self, job: Job, source: Path, owner: str | None) -> ExpertInfo | None:
        """Add the package at `source` and make it live.

        Args:
            owner: the only owner whose package may come this way; None for any.

        Returns:
            The former version, which requests may still be using, if it replaces one.

        Raises:
            CommitUnknown: the store may have it, and the private copy stays.
            ExpertError: nothing was changed.
        """
        self._pool.arriving.add(job.id)
        try:
            since = await asyncio.to_thread(self._pool.repository.epoch)
            with await self._take_in(job, source) as package:
                await asyncio.to_thread(self._check_owner, package.manifest, owner)
                job.expert, job.version = package.manifest.id, package.manifest.version
                return await self._load(job, package, since, owner)
        except Exception:
            if job.committed is False:
                copy = self._pool.places.private / job.id
                await asyncio.to_thread(shutil.rmtree, copy, ignore_errors=True)
            raise
        finally:
            self._pool.arriving.discard(job.id)

    async def _take_in(self, job: Job, source: Path) -> VerifiedPackage:
        loop, places = asyncio.get_running_loop(), self._pool.places
        handled = 0

        def progress(count: int) -> None:
            nonlocal handled
            handled += count
            loop.call_soon_threadsafe(setattr, job, "done", handled)

        await job.at("copied", unit="bytes")
        base = await self._pool.base()
        try:
            check = partial(
                open_package,
                source,
                base=base,
                trusted_keys=places.trusted_keys,
                into=places.new_copy(job.id),
                progress=progress,
                keep_free=FREE_BYTES,
            )
            package = await loop.run_in_executor(_CHECKS, check)
        except ExpertsError as error:
            message = str(error).replace(str(source), job.package).replace(str(places.private), "the server")
            if isinstance(error, DiskFull):
                raise ChangeConflict(f"{message[:1].upper()}{message[1:]}.", code="disk_full") from error
            raise PackageRefused(f"{message}.") from error
        await job.at("verified")
        return package

    async def _load(self, job: Job, package: VerifiedPackage, since: int, owner: str | None) -> ExpertInfo | None:
        manifest, pool = package.manifest, self._pool
        await asyncio.to_thread(self._check_version, manifest, since)
        kept = await asyncio.to_thread(pool.repository.slots_of_others, manifest.id)
        if owner is not None:
            pool.require_share(manifest.id, owner)
        slot = pool.take_slot(kept, manifest.owner, manifest.rank)
        try:
            digests = await self._fill(job, package, slot)
            tried = await self._try(job, manifest.id, slot)
            async with pool.changing:
                slot_epoch = await self._newest(slot, tried)
                await asyncio.to_thread(self._check_version, manifest, since)
                return await self._make_live(job, package, slot, slot_epoch, digests)
        except Exception:
            if not job.committed and await pool.release(slot) and job.committed is None:
                pool.hold(slot, package.directory.name)
            raise

    async def _newest(self, slot: int, tried: int) -> int:
        """The slot epoch that a commit will give the slot, under which it is open afterwards.

        Others may have changed what is served while the expert was tried under `tried`. Whatever another server changes
        from here on has the commit refused.
        """
        slots = self._pool.slots
        slot_epoch = await asyncio.to_thread(self._pool.repository.epoch) + 1
        if slot_epoch != tried:
            try:
                await slots.close(slot)
                await slots.open(slot, slot_epoch)
            except Exception as error:
                raise EngineFailed(f"The slot could not be opened anew: {error}.") from error
        return slot_epoch

    async def _make_live(
        self, job: Job, package: VerifiedPackage, slot: int, slot_epoch: int, digests: list[str]
    ) -> ExpertInfo | None:
        manifest, pool = package.manifest, self._pool
        former = pool.find(manifest.id)
        await self._commit(job, package, slot, slot_epoch)
        if former is not None:
            pool.mark_dirty(former.slot)
            pool.retiring[manifest.id].append(former)
        await job.at("dark")
        with suppress(PolicyError):  # else the next poll sees it
            await asyncio.to_thread(self._confirm)
        present = pool.find(manifest.id)  # a revocation may have begun to drain it
        live = present is None or present.live
        digest = manifest.weights.digest
        info = ExpertInfo(manifest.id, manifest.owner, manifest.domain, slot, slot_epoch, live=live, package=digest)
        pool.client.publish((*pool.others(manifest.id), info), slot_epoch)
        pool.claim(slot)
        logger.info("expert %s version %d is live in slot %d", manifest.id, manifest.version, slot)
        await job.at("live")
        result = {"slot": slot, "slot_epoch": slot_epoch, "weights_epoch": slot_epoch, "digests": digests}
        await job.succeed(result, self._clock())
        return former

    async def _fill(self, job: Job, package: VerifiedPackage, slot: int) -> list[str]:
        await job.at("loaded", unit="layers")

        def progress(_ranks: int, done: int, total: int) -> None:
            job.done, job.total = done, total

        digests = await self._pool.fill(slot, package.ticket, progress)
        await job.at("agreed")
        return digests

    async def _try(self, job: Job, expert: str, slot: int) -> int:
        """Open the slot for the canary alone and test its expert; returns the slot epoch of the test."""
        pool = self._pool
        public = pool.client.experts()[0].ref
        slot_epoch = await asyncio.to_thread(pool.repository.epoch) + 1
        try:
            await pool.slots.open(slot, slot_epoch)
            await job.at("canary")
            await self._canary(public, ExpertSlotRef(expert, slot, slot_epoch))
        except CanaryNotScheduled as error:
            raise EngineBusy(
                f"The engine was too busy to try the expert: {error}. Nothing was changed. "
                "Add it again when fewer requests are running, or start the server with a larger --max-num-seqs."
            ) from error
        except Exception as error:
            raise EngineFailed(
                f"The expert failed its canary and was unloaded: {error}. Check the package's weights."
            ) from error
        return slot_epoch

    async def _commit(self, job: Job, package: VerifiedPackage, slot: int, slot_epoch: int) -> None:
        manifest, repository = package.manifest, self._pool.repository
        added = Added(
            manifest.id,
            manifest.version,
            slot,
            slot_epoch,
            package.directory.name,
            manifest.weights.digest,
            manifest.base.digest,
            self._pool.merged.get(manifest.id),
            manifest.rank,
        )
        try:
            await asyncio.to_thread(repository.add, manifest, added, actor=job.actor, at=self._clock())
        except PolicyError as error:
            job.committed = await asyncio.to_thread(self._was_committed, added)
            if job.committed is None:
                now = (
                    "The expert is not in use. Restart the server, which loads it if it was stored, or add it again."
                    if self._pool.find(manifest.id) is None
                    else "The former version is still served. Restart the server, which loads the new one if it was "
                    "stored, or add it again."
                )
                raise CommitUnknown(error, now) from error
            if not job.committed:
                raise ChangeConflict(f"The store refused the change: {error}.", code="store_refused") from error
        job.committed = True

    def _was_committed(self, added: Added) -> bool | None:
        """Whether the commit succeeded and only its answer was lost; None if unknown."""
        try:
            return added in self._pool.repository.added()
        except PolicyError:
            return None

    def _check_version(self, manifest: Manifest, since: int) -> None:
        """Refuse a package whose version is not newer, or that was sent before the expert was revoked.

        Args:
            since: the weights epoch at which its job began.
        """
        pool = self._pool
        if pool.repository.revocation_epochs().get(manifest.id, 0) > since:
            raise ChangeConflict(
                f"Expert '{manifest.id}' was revoked while this package was being added. To serve it anyway, add the "
                "package again.",
                code="experts_changing",
            )
        info = pool.find(manifest.id)
        if info is None:
            return
        if not info.live:
            raise ChangeConflict(
                f"Expert '{manifest.id}' is being revoked. Add it again once that is done.", code="experts_changing"
            )
        if pool.repository.revocation_epochs().get(info.id, 0) > info.slot_epoch:
            raise ChangeConflict(
                f"Expert '{info.id}' was revoked by another server and is being unloaded here. Try again in a moment.",
                code="experts_changing",
            )
        package = next((entry for entry in pool.repository.added() if entry.expert == info.id), None)
        if package is None or is_set_aside(package, pool.merged):
            loaded = pool.merged.get(info.id, UNSAID)
        elif package.slot_epoch == info.slot_epoch:
            loaded = package.version
        else:
            raise ChangeConflict(
                f"Version {package.version} of expert '{info.id}' is stored but not loaded on this server. "
                + (
                    "Restart the server."
                    if (pool.places.private / package.package).is_dir()
                    else "Another server added it."
                ),
                code="expert_version_not_loaded",
            )
        if loaded == UNSAID:
            raise ChangeConflict(
                f"Expert '{manifest.id}' is loaded from the checkpoint, which names no version of it. "
                "Revoke it before adding a package.",
                code="expert_version_unknown",
            )
        if manifest.version <= loaded:
            raise ChangeConflict(
                f"Expert '{manifest.id}' is loaded in version {loaded}. Add a package with a higher version.",
                code="expert_version_not_newer",
            )

    def _check_owner(self, manifest: Manifest, owner: str | None) -> None:
        if owner is not None and manifest.owner != owner:
            raise ChangeConflict(
                f"The package does not belong to owner '{owner}', whose key this is.",
                code="expert_of_another_owner",
            )
        if owner is not None and manifest.training.router != "own":
            raise ChangeConflict(
                f"The package's 'training.router' is '{manifest.training.router}', so that excluding the expert "
                "may not exclude all that routers have learnt from it. Train its router on its own, or ask an "
                "administrator to add the package.",
                code="expert_router_not_own",
            )
        self._pool.repository.require_owner(manifest)
