"""Slots of several ranks in this process, and everything between a package and a committed change.

The writer, the slot tables, the service, the store and the package checks are the real ones; only the
inference engine around them is missing. Gates are checked as an engine core would check them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from packagekit import ONE, make_package

from flexgate.experts.checkpoint.base import base_identity
from flexgate.experts.package.weights import WeightsTicket
from flexgate.policies.audit import Event
from flexgate.policies.explain import needing
from flexgate.policies.store.catalogue import ManifestExpert
from flexgate.policies.store.store import Store
from flexgate.server.engine.core.scheduler import EXPERT_REVOKED
from flexgate.server.engine.frontend.calls import ExpertInfo, ExpertSlotRef, GatedCall
from flexgate.server.engine.frontend.slot_control import Closed, SlotTaskFailed
from flexgate.server.engine.protocol.slot_tasks import from_wire, to_wire
from flexgate.server.engine.protocol.slots import SlotMap, SlotTable
from flexgate.server.engine.worker.slot_arrays import SlotArrays, low_rank_experts
from flexgate.server.engine.worker.slot_writer import SlotWriter
from flexgate.server.experts.repository import WeightsRepository
from flexgate.server.experts.service import ExpertService
from flexgate.server.experts.slot_pool import Places, Progress, SlotPool

SLOTS = 5
RANKS = (4, 2)  # of two more slots
LAYERS = ONE.num_hidden_layers
MAP = SlotMap.of_checkpoint((b"\0\1",) * LAYERS, 2, SLOTS, RANKS)
PUBLIC = ExpertInfo("public", "public", "", 0, 1, True)
NEWS = ExpertInfo("news", "gazette", "news", 1, 1, True)
CHECKPOINT = (ManifestExpert("public", "public", ""), ManifestExpert("news", "gazette", "news"))
MERGED = {"public": 0, "news": 1}  # versions that the checkpoint names


def rank_writer(shard: int, shards: int) -> SlotWriter:
    """One rank's arrays for the small test model; slots 0 and 1 hold ones."""
    hidden, inner = ONE.hidden_size, ONE.intermediate_size // shards
    layers = []
    for _ in range(LAYERS):
        routers = [torch.zeros(MAP.total, *shape) for shape in ((hidden,), ())]
        arrays = [*routers, *(torch.zeros(SLOTS, *shape) for shape in ((2 * inner, hidden), (hidden, inner)))]
        for array in arrays:
            array[:2] = 1.0
        groups = low_rank_experts(RANKS, torch.zeros(1, hidden, ONE.intermediate_size))
        factors = [one for group in groups for one in zip(*group.tensors, strict=True)]
        (unit_E,) = {*MAP.unit_LE}
        layers.append(SlotArrays(unit_E, *arrays, local=lambda slot: slot, factors=factors, shards=shards, shard=shard))
    return SlotWriter(layers)


@dataclass
class LocalSlots:
    """What `SlotOperator` is to an engine."""

    table: SlotTable
    ranks: list[SlotWriter]
    fails: dict[str, int] = field(default_factory=dict)  # what shall go wrong, and how often
    hold: asyncio.Event | None = None  # filling waits for it
    held: bool = False
    busy: set[int] = field(default_factory=set)  # slots that requests are using

    async def fill(self, slot: int, ticket: WeightsTicket, progress: Progress) -> list[str]:
        self.table.require_masked(slot)
        wired = to_wire(ticket)
        if self.hold is not None:
            self.held = True
            await self.hold.wait()
        for rank in self.ranks:
            rank.load(slot, from_wire(wired))
        return await self._finish("fill", slot, progress)

    async def clear(self, slot: int) -> list[str]:
        self.table.require_masked(slot)
        for rank in self.ranks:
            rank.clear(slot)
        return await self._finish("clear", slot, lambda *_: None)

    async def open(self, slot: int, slot_epoch: int) -> None:
        self._fail("open")
        self.table.open(slot, slot_epoch)

    async def close(self, slot: int) -> Closed:
        self._fail("close")
        self.table.close(slot)
        return Closed(0, 0)

    async def users(self, slot: int) -> int:
        return int(slot in self.busy)

    def digests(self, slot: int) -> list[str]:
        return [rank.digest(slot) for rank in self.ranks]

    async def _finish(self, what: str, slot: int, progress: Progress) -> list[str]:
        while any(rank.report(slot)["state"] == "running" for rank in self.ranks):
            await asyncio.sleep(0.001)
        self._fail(what)
        reports = [rank.report(slot) for rank in self.ranks]
        progress(len(reports), sum(r["done"] for r in reports), sum(r["total"] for r in reports))
        for number, report in enumerate(reports):
            if report["state"] != "done":
                raise SlotTaskFailed(f"rank {number}: {report['error']}")
        return [report["digest"] for report in reports]

    def _fail(self, what: str) -> None:
        if self.fails.get(what):
            self.fails[what] -= 1
            raise SlotTaskFailed(f"rank 0: {what} was made to fail")


class LocalClient:
    """What `GatedEngineClient` is to the service."""

    def __init__(self, experts: tuple[ExpertInfo, ...], epoch: int = 1) -> None:
        self.slots_for = MAP.slots_for
        self.published: list[tuple[str, ...]] = []
        self.publish(experts, epoch)
        self.open: list[GatedCall] = []

    def experts(self) -> tuple[ExpertInfo, ...]:
        return self._experts

    def publish(self, experts: tuple[ExpertInfo, ...], weights_epoch: int) -> None:
        self._experts = tuple(sorted(experts, key=lambda info: info.slot))
        self.slot_epochs = {info.id: info.slot_epoch for info in experts if info.live}
        self.weights_epoch = weights_epoch
        self.published.append(tuple(info.id for info in self._experts))

    def in_use(self, ref: ExpertSlotRef) -> bool:
        return any(ref in call.experts and not call.ended.is_set() for call in self.open)

    def revoke(self, ref: ExpertSlotRef) -> tuple[GatedCall, ...]:
        users = tuple(call for call in self.open if ref in call.experts)
        for call in users:
            call.failed = EXPERT_REVOKED
        return users


@dataclass
class Local:
    """A service and all that is under it."""

    service: ExpertService
    client: LocalClient
    slots: LocalSlots
    store: Store
    recorded: list[tuple[str, str, dict[str, Any]]]
    canary_fails: list[Exception] = field(default_factory=list)
    canary_hold: asyncio.Event | None = None  # a canary waits for it

    async def add(self, package: Path, **options: Any) -> Any:
        """Add and wait; the ended job."""
        job = self.service.start_add(package, name=package.name, actor="key_admin", limited_with="key_admin", **options)
        async for _ in job.watch():
            pass
        return job


def local(
    store: Store,
    anchor: Path,
    directory: Path,
    *,
    ranks: int = 2,
    without: frozenset[str] = frozenset(),
    epoch: int = 1,
    merged: Mapping[str, int] = MERGED,
    per_owner: int = 2,
) -> Local:
    """A served model of `public` and `news`, and three free slots."""
    experts = tuple(replace(info, slot_epoch=epoch) for info in (PUBLIC, NEWS) if info.id not in without)
    table = SlotTable(MAP, {info.slot: epoch for info in experts})
    slots = LocalSlots(table, [rank_writer(shard, ranks) for shard in range(ranks)])
    if "news" in without:
        for rank in slots.ranks:
            rank.clear(1)
            rank.wait(1)
    client = LocalClient(experts, epoch)
    places = Places(private=directory / "experts", base=lambda: base_identity(anchor), trusted_keys=None)
    recorded: list[tuple[str, str, dict[str, Any]]] = []
    made: list[Local] = []

    async def canary(*_: ExpertSlotRef) -> None:
        if made[0].canary_hold is not None:
            await made[0].canary_hold.wait()
        if made[0].canary_fails:
            raise made[0].canary_fails.pop()

    def record(actor: str, action: str, detail: dict[str, Any]) -> None:
        store.record([Event(at=1.0, actor=actor, action=action, detail=detail)])
        recorded.append((actor, action, detail))

    confirm: Callable[[], object] = lambda: None  # noqa: E731
    pool = SlotPool(client, slots, WeightsRepository(store), places, merged, per_owner=per_owner)

    def needing_it(expert: str) -> tuple[str, ...]:
        return needing(store.snapshot(), expert, 1.0)

    service = ExpertService(pool, canary=canary, confirm=confirm, record=record, clock=time.time, needing=needing_it)
    made.append(Local(service, client, slots, store, recorded))
    return made[0]


def revoked_in(store: Store) -> Callable[[str, int], bool]:
    """What a policy source says of a store that it has just asked."""
    return lambda expert, slot_epoch: store.revocation_epochs().get(expert, 0) > slot_epoch


def package(tmp_path: Path, anchor: Path, expert: str = "math", owner: str = "acme", **options: Any) -> Path:
    """A new package in a folder of its own."""
    target = tmp_path / f"package-{expert}-{len(list(tmp_path.iterdir()))}"
    make_package(target, anchor, expert=expert, owner=owner, **options)
    return target


def zeros(here: Local) -> list[str]:
    """What a rank's empty slot hashes to; slot 4 is never the first free one in tests that ask."""
    return here.slots.digests(4)
