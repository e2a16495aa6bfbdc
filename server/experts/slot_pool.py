"""Slots of the engine in this process: which expert each holds, which are free, which are dirty."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flexgate.experts.checkpoint.base import BaseIdentity
from flexgate.experts.errors import LayoutError
from flexgate.experts.package.signature import TrustedKeys
from flexgate.experts.package.weights import WeightsTicket
from flexgate.policies.errors import PolicyError
from flexgate.server.engine.frontend.calls import ExpertInfo, ExpertSlotRef, GatedCall
from flexgate.server.experts.errors import ChangeConflict, EngineFailed, PackageRefused
from flexgate.server.experts.repository import WeightsRepository
from flexgate.server.experts.versions import Merged
from flexgate.server.policy.executors import CHANGES, REMOVALS, run_in

Progress = Callable[[int, int, int], None]

logger = logging.getLogger(__name__)


class EngineClient(Protocol):
    """The part of the engine client that gates are sealed from."""

    weights_epoch: int

    def slots_for(self, rank: int | None) -> tuple[int, ...]: ...
    def experts(self) -> tuple[ExpertInfo, ...]: ...
    def publish(self, experts: tuple[ExpertInfo, ...], weights_epoch: int) -> None: ...
    def in_use(self, ref: ExpertSlotRef) -> bool: ...
    def revoke(self, ref: ExpertSlotRef) -> tuple[GatedCall, ...]: ...


class Slots(Protocol):
    """The engine's slots on every rank; see `flexgate.server.engine.frontend.slot_control`."""

    async def fill(self, slot: int, ticket: WeightsTicket, progress: Progress) -> list[str]: ...
    async def clear(self, slot: int) -> list[str]: ...
    async def open(self, slot: int, slot_epoch: int) -> None: ...
    async def close(self, slot: int) -> Any: ...
    async def users(self, slot: int) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where private copies are kept, what they must fit, and whose signatures count (None: all)."""

    private: Path
    base: Callable[[], BaseIdentity]
    trusted_keys: TrustedKeys | None

    def new_copy(self, name: str) -> Path:
        """Where a private copy may be made."""
        self.private.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self.private / name


class SlotPool:
    """The slots, shared by all jobs that change them.

    `changing` is held while what is served changes, never while files are copied or slots are filled: a
    revocation does not wait until another expert has been loaded.

    Attributes:
        arriving: names of private copies that are being made and loaded.
        merged: versions of the checkpoint's experts.
        retiring: former versions that requests may still be using, by expert.
        per_owner: slots that one owner's packages may take, where that owner adds them.
    """

    def __init__(
        self,
        client: EngineClient,
        slots: Slots,
        repository: WeightsRepository,
        places: Places,
        merged: Merged,
        *,
        per_owner: int,
    ) -> None:
        self.client = client
        self.slots = slots
        self.repository = repository
        self.places = places
        self.merged = merged
        self.per_owner = per_owner
        self.changing = asyncio.Lock()
        self.arriving: set[str] = set()
        self.retiring: dict[str, list[ExpertInfo]] = defaultdict(list)
        self._dirty: set[int] = set()
        self._held: dict[str, int] = {}
        self._reserved: dict[int, str] = {}  # slots that are being filled, and the owners of what comes into them
        self._base: BaseIdentity | None = None
        self._removing: set[asyncio.Task[None]] = set()

    def find(self, expert: str) -> ExpertInfo | None:
        """A loaded expert."""
        return next((info for info in self.client.experts() if info.id == expert), None)

    def others(self, expert: str) -> tuple[ExpertInfo, ...]:
        """All loaded experts but one."""
        return tuple(info for info in self.client.experts() if info.id != expert)

    def take_slot(self, kept: Collection[int], owner: str, rank: int | None = None) -> int:
        """Reserve the best slot that is clean and free for a package of `owner`.

        Args:
            kept: slots that are not given away; see `WeightsRepository.slots_of_others`.
            rank: of the package's expert; None for one with an FFN of its own.

        Raises:
            PackageRefused: no slot has room for the rank.
            ChangeConflict: all that have are taken.
        """
        fitting = self.client.slots_for(rank)
        if rank is not None and not fitting:
            raise PackageRefused(
                f"No slot has room for an expert of rank {rank}. Start the server with --slots r{rank}=1 and "
                "--moe-kernels flexgate, or merge the package with 'flexgate experts merge' and serve that model."
            )
        loaded = {info.slot for info in self.client.experts()}
        free = [slot for slot in fitting if slot not in loaded | self._dirty | set(kept)]
        if not free:
            idle = len(set(kept).intersection(fitting).difference(self._dirty, loaded))
            left_out = f", {idle} of them by packages that were not loaded at the start" if idle else ""
            kind = "expert slots" if rank is None else f"slots with room for rank {rank}"
            more = "a larger --max-experts" if rank is None else "more of them (--slots)"
            raise ChangeConflict(
                f"All {len(fitting)} {kind} are taken{left_out}. Revoke an expert, or start the server with {more}.",
                code="slots_full",
            )
        self.mark_dirty(free[0])
        self._reserved[free[0]] = owner
        return free[0]

    def require_share(self, expert: str, owner: str) -> None:
        """Refuse one more package of an owner whose packages take all the slots they may; raises `ChangeConflict`.

        The version that the package replaces does not count, earlier ones that requests still use do.
        """
        loaded = [info for info in self.client.experts() if info.id != expert and info.id not in self.merged]
        former = [info for infos in self.retiring.values() for info in infos]
        taken = sum(info.owner == owner for info in loaded + former) + list(self._reserved.values()).count(owner)
        if taken >= self.per_owner:
            raise ChangeConflict(
                f"Owner '{owner}' uses {taken} of its {self.per_owner} expert slots (former versions in use count). "
                "Revoke one of its experts, or ask an administrator to add this package.",
                code="owner_slots_full",
            )

    def mark_dirty(self, slot: int) -> None:
        """Mark a slot that no gate may name: not free until it was cleared."""
        self._dirty.add(slot)

    def hold(self, slot: int, package: str) -> None:
        """Hold a clear slot for a stored package that may come back: not free until `release_package`."""
        self._dirty.add(slot)
        self._held[package] = slot

    def release_package(self, package: str) -> None:
        """Free the slot of a package that the store does not name any more."""
        if package in self._held:
            self._dirty.discard(self._held.pop(package))

    def claim(self, slot: int) -> None:
        """Assign a reserved slot to its loaded expert."""
        self._dirty.discard(slot)
        self._reserved.pop(slot, None)

    async def base(self) -> BaseIdentity:
        """The identity of the served base model, read once; raises `PackageRefused` where no package can fit it."""
        if self._base is None:
            try:
                self._base = await asyncio.to_thread(self.places.base)
            except LayoutError as error:
                raise PackageRefused(f"The served model takes no expert packages: {error}.") from error
        return self._base

    async def fill(self, slot: int, ticket: WeightsTicket, progress: Progress) -> list[str]:
        """Load an expert into a reserved slot on every rank; raises `EngineFailed`."""
        try:
            return await self.slots.fill(slot, ticket, progress)
        except Exception as error:
            raise EngineFailed(f"The expert could not be loaded: {error}.") from error

    async def clear(self, slot: int) -> list[str]:
        """Zero a closed slot on every rank; it is free then. Raises what the engine raises."""
        digests = await self.slots.clear(slot)
        self._dirty.discard(slot)
        self._reserved.pop(slot, None)
        return digests

    async def release(self, slot: int) -> bool:
        """Close, zero and free a slot; returns whether that succeeded. Otherwise the slot is not used again."""
        with suppress(Exception):  # it may never have been opened
            await self.slots.close(slot)
        try:
            await self.clear(slot)
        except Exception as error:
            logger.error("slot %d cannot be cleared and is not used any more", slot, exc_info=error)
            return False
        return True

    async def forget_copies(self) -> asyncio.Task[None]:
        """Free slots that were held for packages that the store does not name any more, and remove private copies.

        Returns:
            The removal, which goes on in the background: large files take the disk seconds.
        """
        removal = asyncio.create_task(self._remove_copies())
        self._removing.add(removal)
        removal.add_done_callback(self._removing.discard)
        if held := set(self._held):
            for package in held - {entry.package for entry in await run_in(CHANGES, self.repository.added)}:
                self.release_package(package)
        return removal

    async def _remove_copies(self) -> None:
        try:
            await run_in(REMOVALS, self._forget_copies)
        except (PolicyError, OSError) as error:  # the next removal takes these with it
            logger.error("private copies of packages are not removed yet: %s", error)

    def _forget_copies(self) -> None:
        """Remove private copies of packages that are not loaded.

        The order matters: a copy is made while it arrives, and stops to arrive only after it was committed. So one that
        is found, and then does not arrive, is in the store by the time that the store is read, or never will be.
        """
        if not self.places.private.is_dir():
            return
        found, arriving = list(self.places.private.iterdir()), tuple(self.arriving)
        stored = {entry.package for entry in self.repository.added()}
        for path in found:
            if path.name not in stored and not any(name in path.name for name in arriving):
                shutil.rmtree(path, ignore_errors=True)
