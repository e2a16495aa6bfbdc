"""This version beside an older one: ``make bench BENCH="versions --before FOLDER"``.

FOLDER is a checkout of the older commit with an environment of its own (`make .venv/.dev` there). Engines, servers and
their starts take turns in one run; this version is there twice, so that its second set of starts against the first
shows the noise (A/A).
"""

import itertools
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speed.checkpoint import MIDDLE, TINY, checkpoint, described
from speed.compare import take_turns
from speed.engines import Batch, Timed
from speed.load import Traffic, send
from speed.record import ROOT, Run
from speed.statistics import Ratio, paired

NOW, BEFORE, AGAIN = "now", "before", "now again"
PROGRAM = Path(__file__).with_name("contender.py")
STARTS = 5
BATCHES = {
    "prefill of 8": (Batch(8, 32, 1), "prefill", 10),
    "decode of 1": (Batch(1, 4, 17), "decode", 20),
    "decode of 8": (Batch(8, 4, 13), "decode", 12),
    "decode of 32": (Batch(32, 4, 9), "decode", 8),
}
TRAFFIC = {
    f"chat{', streamed' * stream}, {clients} clients": (Traffic("chat", stream, clients, requests), 4)
    for (clients, requests), stream in itertools.product(((1, 4), (8, 16), (32, 64)), (False, True))
}
Seconds = Mapping[str, Sequence[Sequence[float]]]  # of each contender its starts, of each start its rounds


@dataclass(frozen=True)
class Contender:
    """A version that runs."""

    process: "subprocess.Popen[str]"

    def ask(self, question: Any = None) -> Any:
        """Its next answer; raises `RuntimeError` where it has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if question is not None:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with status {self.process.wait()}; it printed why above")
        return json.loads(line)


@contextmanager
def contender(kind: str, version: Path, model: Path, folder: Path) -> Iterator[Contender]:
    """Begin to start one; it ends with the block."""
    path = os.pathsep.join(str(version / part) for part in ("benchmarks", "tests/support"))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    folder.mkdir(parents=True)
    command = (str(version / ".venv/bin/python"), str(PROGRAM), kind, str(model), str(folder))
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder
    )
    try:
        yield Contender(process)
        process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()


def run(asked: Run) -> None:
    """Measure engines, then servers; raises `ValueError` for a folder that is no checkout with an environment."""
    if asked.before is None:
        raise ValueError("versions: give --before FOLDER, a checkout of the older commit with its own .venv")
    if not (asked.before / ".venv/bin/python").exists() or not (asked.before / "benchmarks/speed").is_dir():
        raise ValueError(f"--before {asked.before}: run 'make .venv/.dev' in a checkout of the older commit first")
    versions = {NOW: ROOT, BEFORE: asked.before.resolve(), AGAIN: ROOT}
    shape = TINY if asked.quick else MIDDLE
    starts, journal = asked.starts or (1 if asked.quick else STARTS), asked.journal("versions")
    with checkpoint(shape) as model:
        for start in tqdm(range(starts), desc="starts"):
            for kind, measure in (("engine", _engines), ("server", _servers)):
                name = f"{kind}, start {start}"
                if name not in journal:
                    with started(kind, versions, model) as running:
                        journal.add(name, measure(running, asked))
    found, itself = report([{**journal[f"engine, start {n}"], **journal[f"server, start {n}"]} for n in range(starts)])
    commit = subprocess.run(
        ("git", "rev-parse", "HEAD"), cwd=asked.before, check=True, capture_output=True, text=True
    ).stdout.strip()
    what = f"speed of this version / that of {commit[:12]}: 1 is equal, less is slower; of {starts} starts of each"
    measured = {"what": what, "before": commit, "threads": 1, "starts": starts, "cases": found}
    asked.write("versions", measured, shape=described(shape), itself=itself)
    journal.close()


@contextmanager
def started(kind: str, versions: Mapping[str, Path], model: Path) -> Iterator[dict[str, tuple[Contender, Any]]]:
    """All versions side by side, each with its first answer; none is asked before all are ready."""
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        begun = {
            name: stack.enter_context(contender(kind, version, model, root / name.replace(" ", "-")))
            for name, version in versions.items()
        }
        with ThreadPoolExecutor() as pool:
            ready = list(pool.map(lambda one: one.ask(), begun.values()))
        yield {name: (one, answer) for (name, one), answer in zip(begun.items(), ready, strict=True)}


def _engines(running: Mapping[str, tuple[Contender, Any]], asked: Run) -> dict[str, dict[str, list[float]]]:
    """Of each case and contender the seconds of each round."""
    measured = {}
    for name, (batch, phase, usual) in BATCHES.items():
        calls = {which: partial(_phase, one, batch, phase) for which, (one, _) in running.items()}
        measured[name] = take_turns(calls, asked.rounds or (2 if asked.quick else usual))
    return measured


def _phase(one: Contender, batch: Batch, phase: str) -> float:
    seconds: float = getattr(Timed(*one.ask(asdict(batch))), phase)
    return seconds


def _servers(running: Mapping[str, tuple[Contender, Any]], asked: Run) -> dict[str, dict[str, list[float]]]:
    """As of engines; and the seconds until each was ready, which have one round."""
    measured = {"start": {name: [answer["ready_seconds"]] for name, (_, answer) in running.items()}}
    for name, (traffic, usual) in list(TRAFFIC.items())[: 1 if asked.quick else None]:
        calls = {which: _sender(answer["url"], traffic) for which, (_, answer) in running.items()}
        for call in calls.values():
            call()  # warm
        measured[name] = take_turns(calls, asked.rounds or (2 if asked.quick else usual))
    return measured


def _sender(url: str, traffic: Traffic) -> Callable[[], float]:
    """Sends texts that are new in every turn, and the same to every version."""
    seeds = itertools.count()
    return lambda: 1 / send(url, traffic, next(seeds)).rate


def report(starts: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[tuple[str, Ratio]]]:
    """Of each case its ratios, and of each this version against itself."""
    found, itself = [], []
    for case in starts[0]:
        seconds: Seconds = {name: [start[case][name] for start in starts] for name in (NOW, BEFORE, AGAIN)}
        change, noise = paired(seconds[BEFORE], seconds[NOW]), paired(seconds[NOW], seconds[AGAIN])
        itself.append((case, noise))
        found.append({"case": case, "now/before": change.report(), "now again/now": noise.report()})
    return found, itself
