"""Run everything that holds a promise, whole: `make verify`, or `python tests/verify.py [STEP …]`.

The report, `build/verify/COMMIT-MACHINE.json`, names both and, for each step, how it ended, what it counted and how
long it took. A step that passed on this commit and machine is not run again, so a run that was stopped goes on where it
was; planted defects and repeated engine tests go on inside their step. Exit status 1 if a step failed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "verify"
PYTHON = shlex.quote(sys.executable)
WORKERS = os.environ.get("WORKERS", "2")
PYTEST = f"{PYTHON} -m pytest -n {WORKERS} --dist loadgroup --no-loadscope-reorder --timeout=1800"
COUNT = re.compile(r"(\d+)(?: of (\d+))? (passed|failed|skipped|errors?|killed|mutants killed|kills)\b")

STEPS = {
    "lint": "make --no-print-directory lint",
    "test": f"{PYTEST} -m 'not slow'",
    "test-slow": f"{PYTEST} -m slow --ignore=tests/campaigns",
    "defects": f"{PYTHON} tests/defects/run.py --workers {WORKERS} --results {{folder}}/defects.jsonl",
    "mutants": f"{PYTHON} tests/policies/mutate.py",
    "expert-kills": f"{PYTHON} -m kills.experts --kills 1000 --report {{folder}}/expert-kills.json",
    "server-kills": f"{PYTHON} -m kills.servers --kills 50 --report {{folder}}/server-kills.json",
    "ledger-kills": f"{PYTHON} -m kills.ledger --kills 1000 --report {{folder}}/ledger-kills.json",
    "usage-kills": f"{PYTHON} -m kills.usage --kills 30 --report {{folder}}/usage-kills.json",
    "repeat-engine-tests": f"{PYTHON} -m pytest -p enginekit.repeat --repeat 20 -m engine {{part}}",
    "clients": "make --no-print-directory test-clients",
}
ENGINE_TESTS, ENGINE_MARK = "tests/server/engine/**/test_*.py", "pytest.mark.engine"


@dataclass
class Result:
    """How a step ended."""

    command: str
    passed: bool
    counts: dict[str, int]
    seconds: float
    last_line: str
    log: str


@dataclass
class Report:
    """What is known of one commit on one machine."""

    commit: str
    machine: dict[str, str | int]
    steps: dict[str, Result] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Where it lies."""
        key = hashlib.sha256(json.dumps(self.machine, sort_keys=True).encode()).hexdigest()[:8]
        return FOLDER / f"{self.commit[:12]}-{key}.json"

    def load(self) -> Report:
        """What earlier runs found."""
        if self.path.exists():
            known = json.loads(self.path.read_text())["steps"]
            self.steps = {name: Result(**result) for name, result in known.items()}
        return self

    def save(self) -> None:
        """Write it in one go, so that a stopped run leaves the last whole one."""
        passed = all(name in self.steps and self.steps[name].passed for name in STEPS)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self) | {"everything_passed": passed}, indent=2) + "\n")
        part.replace(self.path)


def commit() -> str:
    """The commit that is checked out, with nothing changed since."""
    if changed := _git("status", "--porcelain"):
        sys.exit(f"verify: commit or stash first, since the report names a commit; changed:\n{changed}")
    return _git("rev-parse", "HEAD")


def machine() -> dict[str, str | int]:
    """What durations depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return {
        "name": platform.node(),
        "processor": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }


def run(name: str, folder: Path) -> Result:
    """Run one step with its output on the terminal and in a log; parts that passed before are not run again."""
    command, log = STEPS[name], folder / f"{name}.log"
    done = folder / f"{name}.parts.jsonl"
    known = {one["part"]: one for one in map(json.loads, done.read_text().splitlines())} if done.exists() else {}
    log.open("a" if known else "w").close()
    ended = []
    for part in parts(name):
        if part not in known:
            known[part] = _run(part, command.format(folder=shlex.quote(str(folder)), part=shlex.quote(part)), log)
            if known[part]["passed"]:
                with done.open("a") as file:
                    file.write(json.dumps(known[part]) + "\n")
        ended.append(known[part])
    counts = Counter[str]()
    for one in ended:
        counts.update({what: int(number) for number, _, what in COUNT.findall(one["last_line"])})
    passed, seconds = all(one["passed"] for one in ended), sum(one["seconds"] for one in ended)
    return Result(command, passed, dict(counts), round(seconds, 1), ended[-1]["last_line"], str(log))


def parts(name: str) -> list[str]:
    """The files of a step that runs file by file; one part without a name for any other."""
    if "{part}" not in STEPS[name]:
        return [""]
    return [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(ENGINE_TESTS)) if ENGINE_MARK in path.read_text()]


def _run(part: str, command: str, log: Path) -> dict[str, Any]:
    """How one part of a step ended."""
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "tests/support")])
    needed = "-m kills" in command or "-p enginekit" in command
    environment = os.environ | {"PYTHONSAFEPATH": "1"} | ({"PYTHONPATH": path} if needed else {})
    began, last = time.monotonic(), ""
    with log.open("a") as file:
        process = subprocess.Popen(
            command, shell=True, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            file.write(line)
            last = line.strip(" =\n") or last
    return {
        "part": part,
        "passed": process.wait() == 0,
        "seconds": time.monotonic() - began,
        "last_line": last,
    }


def main(names: list[str]) -> int:
    """Run the named steps, or all; returns the exit status."""
    if unknown := set(names) - STEPS.keys():
        sys.exit(f"verify: no step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    report = Report(commit(), machine())
    FOLDER.mkdir(parents=True, exist_ok=True)
    report.load()
    folder = report.path.with_suffix("")
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names or STEPS, 1):
        known = report.steps.get(name)
        if known and known.passed:
            _say(f"[{number}/{len(names or STEPS)}] {name}: passed before in {known.seconds:.0f} s, {known.last_line}")
            continue
        _say(f"[{number}/{len(names or STEPS)}] {name}: {STEPS[name]}")
        report.steps[name] = run(name, folder)
        report.save()
    failed = [name for name in names or STEPS if not report.steps[name].passed]
    _say(f"{'failed: ' + ', '.join(failed) if failed else 'all passed'}; {report.path.relative_to(ROOT)}")
    return 1 if failed else 0


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _say(line: str) -> None:
    sys.stdout.write(f"verify {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
