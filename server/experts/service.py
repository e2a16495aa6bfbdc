"""Add and revoke experts of a running server: one change at a time, each whole or not at all."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from flexgate.experts.errors import ExpertsError, SignatureInvalid
from flexgate.experts.package.files import MANIFEST_NAME, SIGNATURE_NAME, WEIGHTS_NAME
from flexgate.experts.package.manifest import Manifest, parse_manifest
from flexgate.experts.package.weights import WeightsTicket
from flexgate.policies.errors import PolicyError
from flexgate.policies.ids import PUBLIC
from flexgate.server.engine.frontend.calls import ExpertInfo
from flexgate.server.experts.add import Canary, Loader
from flexgate.server.experts.errors import ChangeConflict, ExpertError, NotLoaded, NotStored, PackageRefused
from flexgate.server.experts.jobs import Job, Jobs
from flexgate.server.experts.repository import Added
from flexgate.server.experts.revoke import Record, Revoker
from flexgate.server.experts.slot_pool import SlotPool
from flexgate.server.experts.versions import is_set_aside

RETIRE_SECONDS: Final = 600.0
"""How long requests may go on with the former version of an expert that was replaced."""
FOLLOW_SECONDS: Final = 0.25
STORE_AGAIN_SECONDS: Final = 1.0

logger = logging.getLogger(__name__)


class ExpertService:
    """Adds, replaces and revokes experts."""

    def __init__(
        self,
        pool: SlotPool,
        *,
        canary: Canary,
        confirm: Callable[[], object],
        record: Record,
        clock: Callable[[], float],
        needing: Callable[[str], Sequence[str]] = lambda _expert: (),
    ) -> None:
        """`confirm` refreshes the policy snapshot; `record` writes to the audit log; `needing` names the projects whose
        requests must use an expert. All block. `clock` (Unix seconds) stamps every change.
        """
        self.jobs = Jobs(clock)
        self._pool = pool
        self._clock = clock
        self._loader = Loader(pool, canary=canary, confirm=confirm, clock=clock)
        self._revoker = Revoker(pool, confirm=confirm, record=record, needing=needing, clock=clock)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._unstored: dict[str, str] = {}  # who revoked what the store could not be told
        self._store_again_at = 0.0

    def start_add(
        self,
        source: Path,
        *,
        name: str,
        actor: str,
        limited_with: str,
        owner: str | None = None,
        move: bool = False,
    ) -> Job:
        """Begin to add the package at `source`.

        Args:
            name: how the caller called it.
            actor: the caller's key.
            limited_with: what the job counts for; see `Principal`.
            owner: the only owner whose package may come this way; None for any.
            move: remove `source` in the end, for uploads.
        """
        job = self.jobs.open(name, actor, limited_with)
        self._begin(self._run(job, source, owner, move))
        return job

    async def revoke(self, expert: str, *, actor: str, drain_seconds: float = 0.0) -> dict[str, Any]:
        """Revoke an expert; see `Revoker.revoke`. Completes also if the caller stops waiting.

        Args:
            drain_seconds: how long running requests may go on before they are ended; no new one begins.
        """
        return await asyncio.shield(self._begin(self._revoke(expert, actor, drain_seconds)))

    async def restore(self, stage: Callable[[str, int, int], None]) -> None:
        """Load the experts that were added before the restart, before anything is served.

        What the checkpoint holds in a newer version is not loaded; nor is, and the log says so, what is not signed by
        a key that is trusted now.

        Raises:
            PackageRefused: a private copy is missing, damaged, or belongs to another base model.
            EngineFailed: a rank cannot load it.
        """
        pool = self._pool
        added = await asyncio.to_thread(pool.repository.added)
        await (await pool.forget_copies())
        for entry in added:
            if is_set_aside(entry, pool.merged):
                continue
            stage(f"loading expert {entry.expert}", 0, 0)
            try:
                manifest = await self._recall(entry)
            except SignatureInvalid as error:
                logger.error("expert %s is left out: %s", entry.expert, error)
                continue
            identity = manifest.base.identity()
            path = pool.places.private / entry.package / WEIGHTS_NAME
            ticket = WeightsTicket(path, entry.weights_digest, identity.architecture, identity.dtype, manifest.size)
            await pool.fill(entry.slot, ticket, lambda *_: None)
            await pool.slots.open(entry.slot, entry.slot_epoch)
            info = ExpertInfo(
                manifest.id,
                manifest.owner,
                manifest.domain,
                entry.slot,
                entry.slot_epoch,
                live=True,
                package=entry.weights_digest,
            )
            pool.client.publish((*pool.others(entry.expert), info), pool.client.weights_epoch)

    async def follow(self, revoked: Callable[[str, int], bool]) -> None:
        """Unload what another process on the same store has revoked; runs for ever.

        Args:
            revoked: whether the policy's snapshot says so of an expert and its slot epoch.
        """
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            await self._store_again()
            for info in self._pool.client.experts():
                if not revoked(info.id, info.slot_epoch):
                    continue
                try:
                    async with self._pool.changing:
                        await self._revoker.follow_revocation(info)
                except (PolicyError, ExpertError) as error:
                    logger.error("expert %s was revoked elsewhere and is not unloaded yet: %s", info.id, error)

    async def _store_again(self) -> None:
        """Retry the revocations that could not be stored."""
        if not self._unstored or time.monotonic() < self._store_again_at:
            return
        for expert, actor in tuple(self._unstored.items()):
            try:
                await self._revoke(expert, actor, 0.0)
            except NotStored:
                break
            except ExpertError as error:
                logger.error("expert %s is not revoked: %s", expert, error)
                del self._unstored[expert]
        self._store_again_at = time.monotonic() + STORE_AGAIN_SECONDS

    async def _run(self, job: Job, source: Path, owner: str | None, move: bool) -> None:
        try:
            former = await self._loader.add(job, source, owner)
        except ExpertError as error:
            logger.warning("job %s failed at %s: %s", job.id, job.stage, error)
            await job.fail(error.code, str(error), self._clock())
            return
        except PolicyError as error:
            logger.error("job %s failed at %s: %s", job.id, job.stage, error)
            await job.fail("store_refused", f"The policy database could not be read: {error}.", self._clock())
            return
        except Exception as error:
            logger.error("job %s failed at %s", job.id, job.stage, exc_info=error)
            await job.fail(
                "internal_error",
                "The server failed to add the expert. Its log names the cause under the job's id.",
                self._clock(),
            )
            return
        finally:
            if move:
                await asyncio.to_thread(shutil.rmtree, source, ignore_errors=True)
        if former is not None:
            try:
                await self._retire(former)
            except Exception as error:
                logger.error("the former version of expert %s is not unloaded yet", former.id, exc_info=error)

    async def _revoke(self, expert: str, actor: str, drain_seconds: float) -> dict[str, Any]:
        if expert == PUBLIC:
            raise NotLoaded("The public expert cannot be revoked.")
        info = self._pool.find(expert)
        if drain_seconds and info is not None:
            await self._drain(info, drain_seconds)
        async with self._pool.changing:
            try:
                record = await self._revoker.revoke(expert, actor=actor)
                self._unstored.pop(expert, None)
                return record
            except NotStored as error:
                if expert not in self._unstored:
                    logger.error("the revocation of expert %s is not stored: %s", expert, error.__cause__)
                self._unstored[expert] = actor
                raise
            except ChangeConflict:
                if drain_seconds and info is not None and info.live:
                    self._revoker.wake(expert)
                raise
            except NotLoaded as error:
                if self.jobs.bring(expert):
                    raise ChangeConflict(
                        "A package of this expert is being added. Revoke it once its job has ended.",
                        code="experts_changing",
                    ) from error
                raise

    async def _drain(self, info: ExpertInfo, seconds: float) -> None:
        """Seal no more gates for an expert and wait for its requests, without the lock."""
        client = self._pool.client
        asleep = replace(info, live=False)
        client.publish((*self._pool.others(info.id), asleep), client.weights_epoch)
        await self._revoker.drained(info, seconds)

    async def _retire(self, former: ExpertInfo) -> None:
        """Let requests finish with the version that was replaced, then zero its slot."""
        await self._revoker.drained(former, RETIRE_SECONDS)
        async with self._pool.changing:
            retiring = self._pool.retiring.get(former.id, [])
            if former in retiring:  # else it was revoked meanwhile
                retiring.remove(former)
                self._pool.client.revoke(former.ref)
                await self._pool.release(former.slot)
                await self._pool.forget_copies()

    async def _recall(self, entry: Added) -> Manifest:
        """The manifest of a private copy of an earlier run; every rank checks the weights again."""
        places = self._pool.places
        path = places.private / entry.package / MANIFEST_NAME
        try:
            text = await asyncio.to_thread(path.read_bytes)
            manifest = parse_manifest(text)
            if places.trusted_keys is not None:
                places.trusted_keys.signer(manifest.owner, text, _signature(path.with_name(SIGNATURE_NAME)))
            difference = (await self._pool.base()).difference(manifest.base.identity())
        except SignatureInvalid:
            raise
        except (ExpertsError, OSError) as error:
            raise PackageRefused(
                f"expert '{entry.expert}', which was added earlier, cannot be loaded: {error}"
            ) from error
        if difference is not None:
            raise PackageRefused(f"expert '{entry.expert}' was added to another base model: {difference}")
        if (manifest.id, manifest.weights.digest) != (entry.expert, entry.weights_digest):
            raise PackageRefused(f"{path.parent} is not the package that was added as '{entry.expert}'")
        return manifest

    def _begin(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _signature(path: Path) -> bytes:
    if not path.is_file():
        raise SignatureInvalid("it is not signed")
    return path.read_bytes()
