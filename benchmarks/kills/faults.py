"""Make a step of an addition or a revocation raise, and judge what the server then holds, serves and comes back to.

The service goes on living, unlike in ``kills.experts``: after each fault its state must be the old or the new one,
the next change must work, and so must a restart. The judge is that of the kills.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slotkit import local as kit
from slotkit.local import Local, LocalSlots, local, revoked_in

from flexgate.experts.io import output
from flexgate.experts.package import intake, verify
from flexgate.policies.store.catalogue import ManifestExpert
from flexgate.policies.store.store import Store
from flexgate.server.engine.worker.slot_arrays import ReadBackError, SlotArrays
from flexgate.server.experts.errors import ExpertError
from flexgate.server.experts.repository import WeightsRepository
from flexgate.server.experts.restore import at_start
from flexgate.server.experts.slot_pool import SlotPool
from kills.experts import RANKS, Op, World, expected_digests, plan, stored

EXPERTS = (ManifestExpert("public", "public", ""), ManifestExpert("news", "gazette", "news"))
DISK = OSError(errno.ENOSPC, "No space left on device")
RANK = RuntimeError("rank 1 does not answer")
DRIVER = sqlite3.OperationalError("disk I/O error")
UNKNOWN = "commit_unknown"
NOT_STORED = "change_not_stored"

Place = tuple[Any, str]  # an owner and its attribute
STEPS: dict[str, tuple[Place, Exception]] = {
    "copy": ((intake, "write_all"), DISK),
    "manifest": ((verify, "write_new"), DISK),
    "settle": ((output, "settle"), DISK),
    "write": ((SlotArrays, "write"), RANK),
    "zero": ((SlotArrays, "clear"), ReadBackError("slot 2 is not zero after it was cleared")),
    **{name: ((LocalSlots, name), RANK) for name in ("fill", "open", "close", "clear", "users")},
    "forget": ((SlotPool, "_forget_copies"), DISK),
}
QUERIES: dict[str, Place] = {
    **{name: (WeightsRepository, name) for name in ("add", "revoke", "epoch", "added")},
    "snapshot": (Store, "snapshot"),
    "record": (Store, "record"),
}
POINTS = (
    *(f"{name}:{when}" for name in STEPS for when in ("before", "after")),
    *(f"{name}:query" for name in QUERIES),
    *(f"{name}:{when}" for name in ("add", "revoke") for when in ("commit", "committed", "unknown")),
)
LEAVES_A_SLOT = ("zero", "close", "clear", "users")  # which a restart clears
LEAVES_A_COPY = (*LEAVES_A_SLOT, "forget", "added")  # which the next change or a restart removes


@dataclass
class Fault:
    """Raises once, when its step is reached for the ``after + 1``-th time."""

    point: str
    after: int
    fired: bool = False
    _armed: list[str] = field(default_factory=list)  # what the driver does wrong next, in order

    @contextmanager
    def planted(self, store: Store) -> Iterator[None]:
        """In the real code, while the block runs."""
        name, _, when = self.point.partition(":")
        with ExitStack() as undo:
            if when in ("before", "after"):
                (owner, attribute), error = STEPS[name]
                undo.enter_context(_around(owner, attribute, functools.partial(self._raise, when, error)))
            else:
                owner, attribute = QUERIES[name]
                undo.enter_context(_around(owner, attribute, functools.partial(self._arm, when)))
                for step in ("do_execute", "do_commit"):
                    undo.enter_context(_around(store.engine.dialect, step, functools.partial(self._drive, step)))
            yield

    def _due(self) -> bool:
        self.after -= 1
        due = self.after < 0 and not self.fired
        self.fired = self.fired or due
        return due

    def _raise(self, when: str, error: Exception, now: str) -> None:
        if now == when and self._due():
            raise error

    def _arm(self, when: str, now: str) -> None:
        if now == "before" and self._due():
            self._armed = {
                "query": ["do_execute before"],
                "commit": ["do_commit before"],
                "committed": ["do_commit after"],
                "unknown": ["do_commit after", "do_execute before"],
            }[when]

    def _drive(self, step: str, now: str) -> None:
        if self._armed[:1] == [f"{step} {now}"]:
            del self._armed[0]
            raise DRIVER


@contextmanager
def _around(owner: Any, attribute: str, told: Callable[[str], None]) -> Iterator[None]:
    """Tell of every call, before it and after."""
    inner, own = getattr(owner, attribute), attribute in vars(owner)

    def sync(*args: Any, **kwargs: Any) -> Any:
        told("before")
        result = inner(*args, **kwargs)
        told("after")
        return result

    async def later(*args: Any, **kwargs: Any) -> Any:
        told("before")
        result = await inner(*args, **kwargs)
        told("after")
        return result

    setattr(owner, attribute, later if asyncio.iscoroutinefunction(inner) else sync)
    try:
        yield
    finally:
        setattr(owner, attribute, inner) if own else delattr(owner, attribute)


Stored = dict[str, tuple[int, int]]  # expert -> (slot, version)


@dataclass
class Trial:
    """One server that has one fault in it."""

    world: World
    place: Path
    store: Store
    wrong: list[str] = field(default_factory=list)

    async def run(self, fault: Fault, ops: list[Op]) -> None:
        """Changes with the fault in them, a restart, and one more change."""
        here = self._start()
        with fault.planted(self.store):
            for op in ops:
                if not await self._change(here, op, fault):
                    break
        here = self._start()
        await here.service.restore(lambda *_: None)
        self._judge(here, self._stored(), slots=0, copies=0)
        versions = {expert: version for expert, (_, version) in self._stored().items()}
        expert = next((e for e in ("math", "code") if versions.get(e, 0) < 3), None)
        await self._change(here, ("add", expert, versions.get(expert, 0) + 1) if expert else ("revoke", "news", 0))

    async def _change(self, here: Local, op: Op, fault: Fault | None = None) -> bool:
        """Once more where a fault has left the old state; whether this server can go on."""
        for fired in (fault is None or fault.fired, True):
            before = self._stored()
            error = await self._attempt(here, op)
            new = _after(before, op)
            if error == NOT_STORED:
                await self._follow(here, set(new) | {"public"})
            now = self._stored()
            versions = {expert: version for expert, (_, version) in now.items()}
            if versions not in ({e: v for e, (_, v) in before.items()}, new):
                self.wrong.append(f"{op} on {before} made {now}")
            if error is None and versions != new:
                self.wrong.append(f"{op} was acknowledged, the store says {now}")
            if error == "slots_full" and here.service._pool._dirty:
                return False
            if error is not None and fired:
                self.wrong.append(f"{op} failed without a fault: {error}")
            if error == UNKNOWN:
                self._judge(here, before, slots=1, copies=1)
                return False
            point = fault.point if fault is not None else ""
            self._judge(here, now, slots=point.startswith(LEAVES_A_SLOT), copies=point.startswith(LEAVES_A_COPY))
            if versions == new:
                return True
        return False

    async def _follow(self, here: Local, experts: set[str]) -> None:
        """A revocation that the store could not be told, or that was committed and not answered."""
        following = asyncio.ensure_future(here.service.follow(revoked_in(self.store)))
        for _ in range(500):
            served = {info.id for info in here.client.experts()}
            if served == experts and not here.service._pool.changing.locked():
                break
            await asyncio.sleep(0.01)
        following.cancel()
        await asyncio.gather(*here.service._pool._removing)  # of copies, in the background

    async def _attempt(self, here: Local, op: Op) -> str | None:
        """The code of the error, or None; waits for everything that was begun."""
        do, expert, version = op
        try:
            if do == "add":
                job = await here.add(self.world.package(expert, version))
                return None if job.error is None else job.error["code"]
            await here.service.revoke(expert, actor="key_admin")
        except ExpertError as error:
            return error.code
        except Exception as error:
            self.wrong.append(f"{op} raised {error!r}")
            return "raised"
        finally:
            ended = await asyncio.gather(*here.service._tasks, return_exceptions=True)
            ended += await asyncio.gather(*here.service._pool._removing, return_exceptions=True)  # which those begin
            for error in ended:
                if isinstance(error, BaseException) and not isinstance(error, ExpertError):
                    self.wrong.append(f"{op} ended with {error!r}")
        return None

    def _start(self) -> Local:
        state = at_start(self.store, EXPERTS, kit.MERGED)
        here = local(self.store, self.world.anchor, self.place, ranks=RANKS, without=state.without, epoch=state.epoch)
        here.service._loader._confirm = here.service._revoker._confirm = self.store.snapshot
        return here

    def _stored(self) -> Stored:
        return stored(self.place / "policy.db", {"news": (1, 0)})

    def _judge(self, here: Local, state: Stored, *, slots: int, copies: int) -> None:
        """How many slots and private copies may be left over."""
        dirty = here.service._pool._dirty
        holders = {"public": 0, **{expert: slot for expert, (slot, _) in state.items()}}
        published = {info.id: info.slot for info in here.client.experts()}
        if published != holders:
            self.wrong.append(f"published {published}, the store says {holders}")
        if set(here.slots.table.live) - dirty != set(holders.values()):
            self.wrong.append(f"live {here.slots.table.live}, the store says {holders}")
        if len(dirty) > slots:
            self.wrong.append(f"slots {dirty} are lost")
        for slot, expected in enumerate(expected_digests(self.world, state)):
            if slot not in dirty and here.slots.digests(slot) != expected:
                self.wrong.append(f"slot {slot} holds something else than the store says")
        spare = len(list((self.place / "experts").glob("*"))) - len(state) + (state.get("news") == (1, 0))
        if not 0 <= spare <= copies:
            self.wrong.append(f"{spare} private copies too many for {state}")


def _after(before: Stored, op: Op) -> dict[str, int]:
    do, expert, version = op
    rest = {e: v for e, (_, v) in before.items() if e != expert}
    return rest | {expert: version} if do == "add" else rest


def trial(world: World, place: Path, point: str, seed: int) -> dict[str, Any]:
    """One fault and its verdict; ``wrong`` is empty where all is well."""
    rng = random.Random(f"{point} {seed}")
    place.mkdir()
    shutil.copy(world.root / "template.db", place / "policy.db")
    ops, fault = plan(rng), Fault(point, rng.randint(0, 1))
    store = Store.open(f"sqlite:///{place / 'policy.db'}")
    try:
        one = Trial(world, place, store)
        asyncio.run(one.run(fault, ops))
        store.verify_audit()
    finally:
        store.close()
    shutil.rmtree(place)
    return {"point": point, "seed": seed, "ops": ops, "fired": fault.fired, "wrong": one.wrong}
