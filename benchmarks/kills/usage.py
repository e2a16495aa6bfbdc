"""Kill a serving server or its engine under load, start it again, and count again what its ledger says.

``python -m kills.usage --kills 30 --report docs/results/usage-kills.json``; with ``--kept FOLDER --minutes 4`` a piece
of it, which the next run goes on with.

Clients stream, ask for whole responses and for several choices, leave in the middle, and make mistakes; each notes what
it got. The engine counts what it takes and generates (``counting/sitecustomize.py``). After the last kill and a last
start, ``kills.recount`` compares all three: delivered ≤ recorded ≤ generated for every request, each recorded once, and
shares as the masses say.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import live_server as live
from rich.progress import track
from text_checkpoint import VOCABULARY, write_checkpoint

from kills.recount import Asked, counted, judge, rows_of
from kills.report import Verdict, command
from kills.servers import kill

COUNTING = Path(__file__).with_name("counting")
CLIENTS = 12
REQUESTS = 340
"""Of all clients, between two kills."""
LAYERS = 2
SPECIAL = 6
BASE = VOCABULARY - SPECIAL
OPTIONS = ("--max-num-seqs=16", "--project-share=1.0")


def last_tokens(number: int) -> list[int]:
    """A request's number as the last tokens of its prompt."""
    return [SPECIAL + number // BASE, SPECIAL + number % BASE]


def number_of(tokens: list[int]) -> int | None:
    """What `last_tokens` was given; None for a prompt of the server's own."""
    if len(tokens) < 2 or min(tokens) < SPECIAL:
        return None
    return (tokens[0] - SPECIAL) * BASE + tokens[1] - SPECIAL


class World:
    """A checkpoint, one server's state directory, and what its clients got, in a folder that may be gone on with."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.seed = seed
        self.rng = random.Random(seed)
        self.asked: list[Asked] = []
        self.verdicts: list[Verdict] = []
        self.keys: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self._kept, self._underway = root / "trials.jsonl", root / "underway"
        self.model = root / "model"
        if self._underway.exists():
            raise SystemExit(f"a run was ended in the midst of a kill, and its clients' notes are lost: delete {root}")
        if not self._kept.exists():
            write_checkpoint(self.model)
            (root / "state").mkdir()
            return
        for line in self._kept.read_text().splitlines():
            found = json.loads(line)
            self.keys = [(id_, value) for id_, value in found["keys"]]
            self.asked += [Asked(**one) for one in found["asked"]]
            self.verdicts.append(found["verdict"])

    @contextmanager
    def trial(self) -> Iterator[dict[str, Any]]:
        """One kill; what it finds is kept with what clients asked meanwhile."""
        self._underway.touch()
        self.rng.seed(f"{self.seed} {len(self.verdicts)}")
        before, verdict = len(self.asked), dict[str, Any]()
        yield verdict
        self.verdicts.append(verdict)
        asked = [asdict(one) for one in self.asked[before:]]
        with self._kept.open("a") as file:
            file.write(json.dumps({"verdict": verdict, "keys": self.keys, "asked": asked}) + "\n")
        self._underway.unlink()

    def start(self) -> Any:
        """The server, ready, on what the last one left; its engine counts."""
        path = os.pathsep.join(filter(None, (str(COUNTING), os.environ.get("PYTHONPATH"))))
        with mock.patch.dict(os.environ, PYTHONPATH=path, FLEXGATE_COUNTED=str(self.root / "counted")):
            server = live.start(self.model, self.root / "state", *OPTIONS)
        if not self.keys:
            with server.client("admin") as http:
                self.keys = [_new_key(http, number) for number in range(CLIENTS)]
        return server

    def begin(self, key: str) -> Asked:
        """The next request."""
        with self.lock:
            number = len(self.asked)
            prompt = self.rng.choice((3, 5, 40, 150, 300))
            self.asked.append(Asked(number, key, time.time(), prompt))
            return self.asked[-1]

    @property
    def ledger(self) -> Path:
        (found,) = self.root.glob("state/*/ledger.db")
        return found


def _new_key(http: httpx.Client, number: int) -> tuple[str, str]:
    """A key's id and value."""
    made = http.post(
        "/v1/organization/projects/proj_all/service_accounts", params={"wait": "all"}, json={"name": f"client {number}"}
    ).json()["api_key"]
    return made["id"], made["value"]


class Clients:
    """Clients that ask one thing after the other until enough was asked, or the server is gone."""

    def __init__(self, world: World, url: str, requests: int) -> None:
        self._world, self._url = world, url
        self._left = requests
        self._threads = [
            threading.Thread(target=self._run, args=(*key, world.rng.random()), daemon=True) for key in world.keys
        ]
        for thread in self._threads:
            thread.start()

    def wait(self, left: int) -> None:
        """Until so few are left to ask."""
        while self._left > left and any(thread.is_alive() for thread in self._threads):
            time.sleep(0.001)

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _run(self, key: str, secret: str, seed: float) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=self._url, headers={"authorization": f"Bearer {secret}"}, timeout=120) as http:
            while True:
                with self._world.lock:
                    self._left -= 1
                    if self._left < 0:
                        return
                asked = self._world.begin(key)
                try:
                    _ask(http, asked, rng)
                except httpx.HTTPError:
                    if asked.status is None:  # the server is gone, or was before it answered
                        return
                finally:
                    asked.ended = time.time()


def _ask(http: httpx.Client, asked: Asked, rng: random.Random) -> None:
    """One request of some kind; notes what comes as it comes."""
    shared = [SPECIAL + (7 * place) % BASE for place in range(asked.prompt - 2)]
    body: dict[str, Any] = {
        "prompt": [*shared, *last_tokens(asked.number)],
        "max_tokens": rng.randint(1, 24),
        "n": rng.choice((1, 1, 1, 2, 3)),
        "temperature": 1.0,
        "logprobs": 0,
        "ignore_eos": True,
        "flexgate": {"experts": {"only": rng.choice((["news"], ["news", "math"], ["math", "code"]))}},
    }
    kind = rng.choices(("stream", "whole", "leave", "error"), (6, 3, 2, 1))[0]
    if kind == "error":
        body |= rng.choice(({"max_tokens": 5000}, {"flexgate": {"experts": {"only": ["nonsense"]}}}, {"n": 99}))
    if kind in ("whole", "error"):
        _whole(http, asked, body)
    else:
        _stream(http, asked, body, leave_after=rng.randint(0, 6) if kind == "leave" else None)


def _whole(http: httpx.Client, asked: Asked, body: dict[str, Any]) -> None:
    response = http.post("/v1/completions", json=body)
    said = response.json()
    asked.status = response.status_code
    if response.status_code == 200:
        asked.delivered = sum(len(choice["logprobs"]["tokens"]) for choice in said["choices"])
        asked.about, asked.finished = said["flexgate"], True


def _stream(http: httpx.Client, asked: Asked, body: dict[str, Any], leave_after: int | None) -> None:
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        asked.status, events = response.status_code, 0
        for line in response.iter_lines():
            if leave_after is not None and events >= leave_after:
                return
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                asked.finished = asked.about is not None
                return
            events += 1
            said = json.loads(line.removeprefix("data: "))
            for choice in said.get("choices", ()):
                asked.delivered += len((choice.get("logprobs") or {}).get("tokens", ()))
            asked.about = said.get("flexgate", asked.about)


def trial(world: World, server: Any, requests: int) -> Any:
    """Load, one kill in the midst of it, and the next start."""
    with world.trial() as verdict:
        victim = world.rng.choice(("server", "server", "engine"))
        clients = Clients(world, server.url, requests)
        clients.wait(world.rng.randrange(requests // 4))
        time.sleep(world.rng.random() * 0.05)
        verdict |= {"victim": victim, "wrong": kill(server, victim)}
        clients.join()
    return world.start()


def run(kills: int, seed: int, requests: int = REQUESTS) -> list[Verdict]:
    """As many kills, one after the other, on one state directory; the last verdict is the recount's."""
    with tempfile.TemporaryDirectory() as directory:
        return _run(World(Path(directory), seed), kills, requests, until=math.inf)


def resume(kills: int, seed: int, kept: Path, seconds: float) -> list[Verdict]:
    """As many kills in all, those of earlier runs in the folder among them; after some seconds, no other one begins."""
    until = time.monotonic() + seconds
    kept.mkdir(parents=True, exist_ok=True)
    return _run(World(kept, seed), kills, REQUESTS, until=until)


def _run(world: World, kills: int, requests: int, *, until: float) -> list[Verdict]:
    left = range(len(world.verdicts), kills)
    server = world.start()
    try:
        for _ in track(left, "kills", disable=not sys.stderr.isatty()):
            server = trial(world, server, requests)
            if time.monotonic() > until:
                break
    finally:
        if server.process.poll() is None:
            live.stop(server)
    rows = rows_of(world.ledger)
    engine = counted(world.root / "counted", number_of)
    wrong = list(judge(world.asked, engine, rows, layers=LAYERS))
    told = {
        "requests": len(world.asked),
        "delivered": sum(one.delivered for one in world.asked),
        "recorded": sum(row.completion for row in rows),
        "generated": sum(one.generated for one in engine.values()),
        "outcomes": dict(Counter(row.outcome for row in rows)),
    }
    return [*world.verdicts, {"recount": told, "wrong": wrong[:20]}]


def figures(verdicts: list[Verdict]) -> dict[str, Any]:
    """What the report counts."""
    *trials, recount = verdicts
    return {
        "kills": len(trials),
        "by_victim": dict(Counter(verdict["victim"] for verdict in trials)),
        **recount["recount"],
    }


if __name__ == "__main__":
    command("usage", __doc__, 30, run, figures, resume=resume)
