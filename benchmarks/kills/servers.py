"""Kill a serving server or its engine while experts are added and revoked, start it again, and judge what it serves.

``python -m kills.servers --kills 50 --report docs/results/server-kills.json``

Each start is the recovery from one kill and the ground of the next. The judge shares no code with the server: it reads
the database with sqlite3, searches the engine's memory for the router rows of every package, and compares answers,
log-probabilities included, with those that were given before the first kill.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import live_server as live
import psutil
from packagekit import make_package
from rich.progress import track
from safetensors.numpy import load_file
from text_checkpoint import write_checkpoint

from kills.experts import stored
from kills.report import command

PACKAGES = (("extra", 1), ("extra", 2), ("more", 1))
CHECKPOINT = ("news", "math", "code", "secret")
STAGES = ("copied", "verified", "loaded", "agreed", "canary", "dark", "live")
LONGEST_CHANGE_S = 1.5
END_SECONDS = 90
CHUNK = 1 << 24
State = dict[str, int]  # expert from a package -> version


@dataclass
class World:
    """A checkpoint, packages made of it, and one server's state directory."""

    root: Path
    rows: dict[tuple[str, int], bytes] = field(default_factory=dict)
    answers: dict[tuple[str, int], Any] = field(default_factory=dict)

    @classmethod
    def build(cls, root: Path) -> World:
        """Random weights; seeded."""
        world = cls(root)
        model = write_checkpoint(root / "model")
        (root / "state").mkdir()
        for seed, (expert, version) in enumerate(PACKAGES):
            target = world.package(expert, version)
            make_package(target, model, expert=expert, version=version, seed=100 + seed)
            world.rows[expert, version] = load_file(target / "expert.safetensors")["layers.0.router.weight"].tobytes()
        return world

    def package(self, expert: str, version: int) -> Path:
        return self.root / f"{expert}-{version}"

    def start(self) -> Any:
        """The server, ready; it goes on from what the last one left."""
        return live.start(self.root / "model", self.root / "state", "--allow-unsigned-experts", "--max-experts=8")

    def stored(self) -> State:
        """What the store says is resident from packages."""
        return {expert: version for expert, (_, version) in stored(self.root / "state" / "flexgate.db", {}).items()}


class Change:
    """One change asked of a server, by a thread that goes down with the connection."""

    def __init__(self, world: World, server: Any, op: tuple[str, str, int]) -> None:
        self.world, self.server, self.op = world, server, op
        self.stages: list[str] = []
        self.acknowledged = False
        self.refused: str | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait_for(self, stage: str, seconds: float) -> None:
        """Until a stage was seen, or the change has ended."""
        deadline = time.monotonic() + seconds
        while stage not in self.stages and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)

    def join(self) -> None:
        self._thread.join(END_SECONDS)

    def _run(self) -> None:
        try:
            with self.server.client("admin") as http:
                self._add(http) if self.op[0] == "add" else self._revoke(http)
        except httpx.HTTPError:
            pass  # the server was killed

    def _add(self, http: httpx.Client) -> None:
        files = {path.name: path.read_bytes() for path in self.world.package(*self.op[1:]).iterdir()}
        sizes = {name: len(data) for name, data in files.items()}
        upload = self._agreed(http.post("/v1/expert_uploads", json={"files": sizes}))["id"]
        for name, data in files.items():
            self._agreed(http.patch(f"/v1/expert_uploads/{upload}/{name}", params={"offset": 0}, content=data))
        job = self._agreed(http.post("/v1/experts", json={"upload": upload}))
        while job["status"] not in ("succeeded", "failed"):
            self.stages.append(job["stage"])
            job = self._agreed(http.get(f"/v1/expert_jobs/{job['id']}"))
        self.stages.append(job["stage"])
        self.acknowledged = job["status"] == "succeeded"
        self.refused = None if self.acknowledged else str(job["error"])

    def _revoke(self, http: httpx.Client) -> None:
        self._agreed(http.delete(f"/v1/experts/{self.op[1]}"))
        self.acknowledged = True

    def _agreed(self, response: httpx.Response) -> Any:
        if response.status_code >= 400:
            self.refused = response.text
            raise httpx.HTTPError(response.text)
        return response.json()


def choose(rng: random.Random, state: State) -> tuple[str, str, int]:
    """A change that is allowed now: a loaded expert is replaced by a newer version only."""
    choices = [("revoke", expert, 0) for expert in sorted(state)]
    choices += [("add", e, v) for e, v in PACKAGES if v > state.get(e, 0)]
    return rng.choice(choices)


def made(state: State, op: tuple[str, str, int]) -> State:
    """The state after a change."""
    do, expert, version = op
    rest = {e: v for e, v in state.items() if e != expert}
    return rest | {expert: version} if do == "add" else rest


def kill(server: Any, victim: str) -> list[str]:
    """End one process at once; what is wrong with how the others took it."""
    family = live.family(server)
    if victim == "server":
        server.process.kill()
    else:
        max(family, key=lambda process: process.memory_info().rss).kill()
    wrong = []
    try:
        server.process.wait(END_SECONDS)
    except Exception:
        wrong.append("the server lived on without its engine")
        server.process.kill()
        server.process.wait(END_SECONDS)
    _, alive = psutil.wait_procs(family, timeout=END_SECONDS)
    for process in alive:
        wrong.append(f"left behind: {process.name()}")
        process.kill()
    return wrong


def answer(server: Any, expert: str) -> Any:
    """What one expert beside the anchor says, or the error's code."""
    body = {"prompt": "the quick brown fox", "max_tokens": 6, "temperature": 0, "logprobs": 3, "cache_salt": expert}
    with server.client("all") as http:
        said = http.post("/v1/completions", json={**body, "flexgate": {"experts": {"only": [expert]}}}).json()
    return said["choices"] if "choices" in said else said["error"]["code"]


def in_memory(server: Any, needles: dict[tuple[str, int], bytes]) -> set[tuple[str, int]]:
    """Whose router rows the engine's process holds, wherever in its own memory."""
    pid = max(live.family(server), key=lambda process: process.memory_info().rss).pid
    found = set()
    overlap = max(map(len, needles.values()))
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            start, end, rights = re.match(r"(\w+)-(\w+) (\S+)", line).groups()  # type: ignore[union-attr]
            if not rights.startswith("rw"):
                continue
            for at in range(int(start, 16), int(end, 16), CHUNK):
                try:
                    memory.seek(at)
                    data = memory.read(min(CHUNK + overlap, int(end, 16) - at))
                except OSError:
                    continue
                found |= {name for name, needle in needles.items() if needle in data}
    return found


def judge(world: World, server: Any, state: State) -> list[str]:
    """What is wrong with a server that was started in this state."""
    wrong = []
    resident = {(expert, version) for expert, version in state.items()}
    if (found := in_memory(server, world.rows)) != resident:
        wrong.append(f"the engine's memory holds {sorted(found)}, the store says {sorted(resident)}")
    for expert in CHECKPOINT:
        if answer(server, expert) != world.answers[expert, 0]:
            wrong.append(f"{expert} of the checkpoint answers differently")
    for expert in sorted({expert for expert, _ in PACKAGES}):
        expected = world.answers[expert, state[expert]] if expert in state else "expert_policy_denied"
        if answer(server, expert) not in (expected, *(["expert_not_found"] if expert not in state else [])):
            wrong.append(f"{expert} is not what the store says: {state.get(expert)}")
    return wrong


def prepare(world: World, server: Any) -> None:
    """Note what everybody answers while nothing goes wrong; leaves the checkpoint's experts alone resident."""
    for expert in CHECKPOINT:
        world.answers[expert, 0] = answer(server, expert)
    with server.client("admin") as http:
        for expert, version in PACKAGES:
            change = Change(world, server, ("add", expert, version))
            change.join()
            terms = {"id": f"a-{expert}", "owner": "acme", "experts": [expert], "assignee": "everyone"}
            http.post("/v1/agreements", params={"wait": "all"}, json={**terms, "effect": "permit"})
            world.answers[expert, version] = answer(server, expert)
        for expert in {expert for expert, _ in PACKAGES}:
            Change(world, server, ("revoke", expert, 0)).join()
    if len({json.dumps(said) for said in world.answers.values()}) != len(world.answers):
        raise RuntimeError(f"answers do not tell experts apart: {world.answers}")


def trial(world: World, server: Any, rng: random.Random) -> tuple[dict[str, Any], Any]:
    """One kill, the next start, and the verdict; ``wrong`` is empty where all is well."""
    state = world.stored()
    op, victim = choose(rng, state), rng.choice(("server", "engine"))
    point = rng.choice(("random time", *STAGES)) if op[0] == "add" else "random time"
    change = Change(world, server, op)
    if point == "random time":
        time.sleep(rng.random() * LONGEST_CHANGE_S)
    else:
        change.wait_for(point, END_SECONDS)
    reached = change.stages[-1] if change.stages else "before any stage"
    wrong = kill(server, victim)
    change.join()
    left = world.stored()
    if left not in ((made(state, op),) if change.acknowledged else (state, made(state, op))):
        wrong.append(f"the store says {left} after {op} on {state}, acknowledged: {change.acknowledged}")
    if change.refused is not None and victim == "server":
        wrong.append(change.refused)
    server = world.start()
    wrong += judge(world, server, world.stored())
    if world.stored() != left:
        wrong.append(f"the start turned {left} into {world.stored()}")
    where = {"op": op[0], "victim": victim, "aimed": point, "reached": reached, "acknowledged": change.acknowledged}
    return {**where, "became": left == made(state, op), "wrong": wrong}, server


def run(kills: int, seed: int) -> list[dict[str, Any]]:
    """As many trials, one after the other, on one state directory."""
    rng, verdicts = random.Random(seed), []
    with tempfile.TemporaryDirectory() as directory:
        world = World.build(Path(directory))
        server = world.start()
        try:
            prepare(world, server)
            for _ in track(range(kills), "kills", disable=not sys.stderr.isatty()):
                verdict, server = trial(world, server, rng)
                verdicts.append(verdict)
        finally:
            if server.process.poll() is None:
                live.stop(server)
    return verdicts


def figures(verdicts: list[dict[str, Any]]) -> dict[str, Any]:
    """What the report counts."""
    return {
        "kills": len(verdicts),
        "by_victim": dict(Counter(verdict["victim"] for verdict in verdicts)),
        "by_point": dict(sorted(Counter(f"{verdict['op']}:{verdict['reached']}" for verdict in verdicts).items())),
        "became_new": sum(verdict["became"] for verdict in verdicts),
    }


if __name__ == "__main__":
    command("servers", __doc__, 50, run, figures)
