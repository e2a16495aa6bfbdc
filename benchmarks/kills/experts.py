"""Kill a process that adds and revokes experts, at named points and at random times, and judge what is left.

``python -m kills.experts --kills 1000 --report docs/results/expert-kills.json``

The killed process runs the real service, store, package checks and slot writer (``slotkit.local``). What it
acknowledged comes through a pipe. A second process recovers as a start does. The judge shares no code with either: it
reads the database with sqlite3 and computes what every rank must hold from the packages' tensors.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packagekit import ONE, make_package, write_model
from rich.progress import track
from slotkit import local as kit
from slotkit.local import LocalSlots, local

from kills.report import command

RANKS = 2
POINTS = (
    *(f"stage:{stage}" for stage in ("copied", "verified", "loaded", "agreed", "canary", "dark", "live")),
    "write:0",
    "write:1",
    "write:3",
    "open:before",
    "open:after",
    "add:before",
    "add:after",
    "revoke:before",
    "revoke:after",
    "close:before",
    "close:after",
    "clear:before",
    "clear:after",
    "forget:before",
    "forget:after",
)
Op = tuple[str, str, int]  # ("add", expert, version) or ("revoke", expert, 0)
State = dict[str, int]  # expert from a package -> version; "news" -> 0 while the checkpoint's is resident


@dataclass(frozen=True)
class World:
    """What all trials start from."""

    root: Path
    tensors: dict[tuple[str, int], dict[str, torch.Tensor]]

    @property
    def anchor(self) -> Path:
        return self.root / "anchor"

    def package(self, expert: str, version: int) -> Path:
        return self.root / f"{expert}-{version}"


def build_world(root: Path) -> World:
    """An anchor, versions of two experts, and a migrated database."""
    from catalogue import sync_catalogue

    from flexgate.policies.store.catalogue import ManifestExpert
    from flexgate.policies.store.store import Store

    write_model(root / "anchor")
    tensors = {}
    for number, (expert, version) in enumerate((e, v) for e in ("math", "code") for v in (1, 2, 3)):
        made = make_package(root / f"{expert}-{version}", root / "anchor", expert=expert, version=version, seed=number)
        tensors[expert, version] = made[1]
    store = Store.open(f"sqlite:///{root / 'template.db'}")
    store.migrate()
    experts = (ManifestExpert("public", "public", ""), ManifestExpert("news", "gazette", "news"))
    sync_catalogue(store, experts, at=1.0)
    store.close()
    return World(root, tensors)


def plan(rng: random.Random) -> list[Op]:
    """Two to four changes that are allowed one after the other."""
    versions, resident, ops = Counter[str](), {"news"}, []
    for _ in range(rng.randint(2, 4)):
        choices: list[Op] = [("revoke", expert, 0) for expert in sorted(resident)]
        choices += [("add", e, versions[e] + 1) for e in ("math", "code") if versions[e] < 3]
        do, expert, version = op = rng.choice(choices)
        ops.append(op)
        versions[expert] = version or versions[expert]
        resident = resident | {expert} if do == "add" else resident - {expert}
    return ops


def after(ops: list[Op]) -> State:
    """The state that these changes, all of them made, lead to."""
    state: State = {"news": 0}
    for do, expert, version in ops:
        if do == "add":
            state[expert] = version
        else:
            state.pop(expert, None)
    return state


def in_child(work: Callable[[Any], None]) -> tuple[int, Any]:
    """Fork; returns the child's pid and the reading end of its pipe."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, os.fdopen(read, "rb")
    os.close(read)
    status = 1
    try:
        with os.fdopen(write, "wb", buffering=0) as pipe:
            work(pipe)
        status = 0
    finally:
        os._exit(status)


def change(world: World, place: Path, ops: list[Op], point: str | None) -> Callable[[Any], None]:
    """The process that will be killed."""

    def work(pipe: Any) -> None:
        from flexgate.policies.store.store import Store

        if point is not None:
            plant(point)
        store = Store.open(f"sqlite:///{place / 'policy.db'}")
        here = local(store, world.anchor, place, ranks=RANKS)

        async def run() -> None:
            for number, (do, expert, version) in enumerate(ops):
                if do == "add":
                    job = await here.add(world.package(expert, version))
                    if job.state != "succeeded":
                        pipe.write(f"failed {number} {job.error}\n".encode())
                        return
                else:
                    await here.service.revoke(expert, actor="key_admin")
                pipe.write(f"ack {number}\n".encode())

        pipe.write(b"began\n")
        asyncio.run(run())

    return work


def plant(point: str) -> None:
    """Make this process kill itself when it comes to ``point`` for the last change that does."""
    from flexgate.server.engine.worker.slot_arrays import SlotArrays
    from flexgate.server.experts.jobs import Job
    from flexgate.server.experts.repository import WeightsRepository
    from flexgate.server.experts.slot_pool import SlotPool

    name, _, when = point.partition(":")
    left = [random.randint(0, 1)]

    def die() -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    def around(owner: type, attribute: str) -> None:
        inner = getattr(owner, attribute)

        def sync(*args: Any, **kwargs: Any) -> Any:
            if when == "before":
                die()
            result = inner(*args, **kwargs)
            if when == "after":
                die()
            return result

        async def later(*args: Any, **kwargs: Any) -> Any:
            if when == "before":
                die()
            result = await inner(*args, **kwargs)
            if when == "after":
                die()
            return result

        setattr(owner, attribute, later if asyncio.iscoroutinefunction(inner) else sync)

    if name == "stage":
        inner = Job.at

        async def at(self: Job, stage: str, *args: Any, **kwargs: Any) -> None:
            await inner(self, stage, *args, **kwargs)
            if stage == when:
                die()

        Job.at = at  # type: ignore[method-assign]
    elif name == "write":
        writing, count = SlotArrays.write, [0]

        def write(self: SlotArrays, *args: Any) -> None:
            if count[0] == int(when):
                die()
            count[0] += 1
            writing(self, *args)

        SlotArrays.write = write  # type: ignore[method-assign]
    else:
        owners: dict[str, tuple[type, str]] = {
            "open": (LocalSlots, "open"),
            "close": (LocalSlots, "close"),
            "clear": (LocalSlots, "clear"),
            "add": (WeightsRepository, "add"),
            "revoke": (WeightsRepository, "revoke"),
            "forget": (SlotPool, "_forget_copies"),
        }
        around(*owners[name])


def recover(world: World, place: Path) -> Callable[[Any], None]:
    """A start after the crash; writes what every rank then holds."""

    def work(pipe: Any) -> None:
        from flexgate.policies.store.catalogue import ManifestExpert
        from flexgate.policies.store.store import Store
        from flexgate.server.experts.restore import at_start

        store = Store.open(f"sqlite:///{place / 'policy.db'}")
        experts = (ManifestExpert("public", "public", ""), ManifestExpert("news", "gazette", "news"))
        state = at_start(store, experts, kit.MERGED)
        here = local(store, world.anchor, place, ranks=RANKS, without=state.without, epoch=state.epoch)
        asyncio.run(here.service.restore(lambda *_: None))
        store.verify_audit()
        found = {
            "published": {info.id: info.slot for info in here.client.experts()},
            "live": dict(here.slots.table.live),
            "digests": [here.slots.digests(slot) for slot in range(kit.SLOTS)],
            "copies": len(list((place / "experts").glob("*"))),
        }
        pipe.write(json.dumps(found).encode())

    return work


def stored(database: Path, checkpoint: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Expert -> (slot, version) of the checkpoint and of what was added, less what was revoked; by SQL alone."""
    with sqlite3.connect(database) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        query = "SELECT action, expert, slot, detail FROM weights_epochs ORDER BY epoch"
        state = dict(checkpoint)
        for action, expert, slot, detail in connection.execute(query):
            if action == "added":
                state[expert] = (slot, json.loads(detail)["version"])
            else:
                state.pop(expert, None)
    return state


def expected_digests(world: World, state: dict[str, tuple[int, int]]) -> list[list[str]]:
    """Slot by slot and rank by rank, what must be resident."""
    holder = {slot: (expert, version) for expert, (slot, version) in state.items()}
    return [[_digest(world, slot, holder.get(slot), rank) for rank in range(RANKS)] for slot in range(kit.SLOTS)]


def _digest(world: World, slot: int, who: tuple[str, int] | None, rank: int) -> str:
    whole = hashlib.sha256()
    share = ONE.intermediate_size // RANKS
    for layer in range(ONE.num_hidden_layers):
        parts = [torch.zeros(ONE.hidden_size), torch.zeros(1)]
        parts += [torch.zeros(2 * share, ONE.hidden_size), torch.zeros(ONE.hidden_size, share)]
        if slot == 0 or who == ("news", 0):
            parts = [torch.ones_like(part) for part in parts]
        elif who is not None:
            tensors, cut = world.tensors[who], slice(rank * share, (rank + 1) * share)
            gate, up, down = (tensors[f"layers.{layer}.{name}_proj.weight"] for name in ("gate", "up", "down"))
            row = tensors[f"layers.{layer}.router.weight"]
            parts = [row, torch.zeros(1), torch.cat((gate[cut], up[cut])), down[:, cut]]
        one = hashlib.sha256()
        for part in parts:
            one.update(part.contiguous().numpy().tobytes())
        whole.update(one.digest())
    return whole.hexdigest()


def trial(world: World, place: Path, seed: int) -> dict[str, Any]:
    """One kill and its verdict; ``wrong`` is empty where all is well."""
    rng = random.Random(seed)
    place.mkdir()
    shutil.copy(world.root / "template.db", place / "policy.db")
    ops, point = plan(rng), rng.choice((None, *POINTS))
    random.seed(seed)
    pid, pipe = in_child(change(world, place, ops, point))
    pipe.readline()
    if point is None:
        time.sleep(rng.random() * 0.25 * len(ops))
        os.kill(pid, signal.SIGKILL)
    said = pipe.read().decode().splitlines()
    _, status = os.waitpid(pid, 0)
    acknowledged = sum(line.startswith("ack") for line in said)
    wrong = [line for line in said if line.startswith("failed")]
    state = stored(place / "policy.db", {"news": (1, 0)})
    versions = {expert: version for expert, (_, version) in state.items()}
    if versions not in (after(ops[:acknowledged]), after(ops[: acknowledged + 1])):
        wrong.append(f"the store says {versions}, acknowledged were {ops[:acknowledged]} of {ops}")
    pid, pipe = in_child(recover(world, place))
    text = pipe.read()
    os.waitpid(pid, 0)
    if not text:
        return {"seed": seed, "point": point, "wrong": [*wrong, "the recovery failed"], "killed": True}
    found = json.loads(text)
    slots = {"public": 0, **{expert: slot for expert, (slot, _) in state.items()}}
    if found["published"] != slots or {int(slot) for slot in found["live"]} != set(slots.values()):
        wrong.append(f"published {found['published']}, live {found['live']}, the store says {slots}")
    if found["digests"] != expected_digests(world, state):
        wrong.append("a rank holds something else than the store says")
    if found["copies"] != len(state) - ("news" in state):
        wrong.append(f"{found['copies']} private copies for {state}")
    shutil.rmtree(place)
    return {"seed": seed, "point": point or "random time", "wrong": wrong, "killed": os.WIFSIGNALED(status)}


def run(kills: int, seed: int) -> list[dict[str, Any]]:
    """Trials until ``kills`` processes were killed."""
    torch.set_num_threads(1)
    verdicts: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        world = build_world(Path(directory))
        for number in track(range(10 * kills), "kills", total=kills, disable=not sys.stderr.isatty()):
            verdicts.append(trial(world, Path(directory) / f"trial-{number}", seed * 1_000_003 + number))
            if sum(verdict["killed"] for verdict in verdicts) >= kills:
                break
    return verdicts


def figures(verdicts: list[dict[str, Any]]) -> dict[str, Any]:
    """What the report counts."""
    killed = [verdict for verdict in verdicts if verdict["killed"]]
    return {
        "torch": torch.__version__,
        "trials": len(verdicts),
        "kills": len(killed),
        "by_point": dict(sorted(Counter(verdict["point"] for verdict in killed).items())),
    }


if __name__ == "__main__":
    command("experts", __doc__, 1000, run, figures)
