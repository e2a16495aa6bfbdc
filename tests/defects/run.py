"""Apply every planted defect to a copy of the source, one by one; each must make a test fail.

Usage: ``python tests/defects/run.py [NAME …]``. A patch in this folder begins with the sentence that
says what is broken and the tests, by pytest's ids, each of which must notice:

    Defect: the guard leaves the client's cache salt as it is
    Test: tests/server/engine/test_engine.py::test_a_prefix_is_shared_within_tenant_and_gate_and_never_across

The checkout is never touched. A test that cannot be collected or set up has noticed nothing: only one that
runs and fails counts. Exit status 1 if a defect survives, a patch no longer applies, or a named test fails
without any defect.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parents[2]
FOLDERS = ("policies", "kernels", "experts", "server")
TEST_SECONDS = 300  # of one test with a defect; every one of them takes well under a minute without
FAILED = re.compile(r"^FAILED (.+?)( - .*)?$", re.MULTILINE)
console = Console(soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Defect:
    """One patch, what it breaks, and the tests that must each fail with it."""

    patch: Path
    sentence: str
    tests: tuple[str, ...]

    @classmethod
    def read(cls, patch: Path) -> "Defect":
        """Parse the head of a patch."""
        head = patch.read_text().split("--- ", 1)[0].splitlines()
        sentence = next(line.removeprefix("Defect: ") for line in head if line.startswith("Defect: "))
        tests = tuple(line.removeprefix("Test: ") for line in head if line.startswith("Test: "))
        return cls(patch, sentence, tests)


class Copy:
    """A copy of source and tests whose ``flexgate`` package comes before the installed one."""

    def __init__(self, place: Path) -> None:
        self.place = place
        for name in (*FOLDERS, "tests"):
            shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "Makefile", "Dockerfile"):
            shutil.copy(ROOT / name, place / name)
        package = place / "site" / "flexgate"
        package.mkdir(parents=True)
        for name in FOLDERS:
            (package / name).symlink_to(place / name)

    def apply(self, patch: Path, *, undo: bool = False) -> bool:
        """Apply a patch or take it back; False if it does not fit."""
        command = ["patch", "-p1", "-s", "-f", "--no-backup-if-mismatch", *(["-R"] if undo else [])]
        with patch.open() as text:
            return subprocess.run(command, cwd=self.place, stdin=text, capture_output=True).returncode == 0

    def test(self, *tests: str, seconds: float | None = None) -> tuple[bool, str]:
        """Whether all of these tests pass, and pytest's words; what does not end in time has not failed either."""
        environment = os.environ | {"PYTHONPATH": str(self.place / "site"), "PYTHONSAFEPATH": "1", "COLUMNS": "400"}
        command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", *tests]
        with subprocess.Popen(
            command,
            cwd=self.place,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                said, _ = process.communicate(timeout=seconds)
            except BaseException as error:  # whatever the test has started goes with it
                os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    return False, f"no end after {seconds:.0f} s"
                raise
        return process.returncode == 0, said


def problem(copy: Copy, defect: Defect) -> tuple[str | None, str]:
    """Why this defect counts against us, or None; and how the tests noticed it."""
    if not defect.tests:
        return "no test is named", ""
    if not copy.apply(defect.patch):
        return "the patch does not apply", ""
    seen = []
    try:
        for test in defect.tests:
            _, said = copy.test("-x", test, seconds=TEST_SECONDS)
            failed = FAILED.search(said)
            if failed is None:
                return f"survived {test}", said[-3000:]
            seen.append((failed[2] or "").removeprefix(" - ")[:160])
    finally:
        if not copy.apply(defect.patch, undo=True):
            raise SystemExit(f"{defect.patch.name} could not be taken back")
    return None, "; ".join(seen)


def main(names: list[str]) -> int:
    """Run the named defects, or all of them."""
    defects = [Defect.read(patch) for patch in sorted(Path(__file__).parent.glob("*.patch"))]
    if unknown := set(names) - {defect.patch.stem for defect in defects}:
        raise SystemExit(f"no such defect: {', '.join(sorted(unknown))}")
    defects = [defect for defect in defects if not names or defect.patch.stem in names]
    started = time.monotonic()
    survivors = 0
    with tempfile.TemporaryDirectory() as place:
        copy = Copy(Path(place))
        tests = sorted({test for defect in defects for test in defect.tests})
        console.print(f"{len(tests)} tests without a defect ...", markup=False)
        passed, said = copy.test(*tests)
        if not passed:
            console.print(said, markup=False)
            return 1
        for number, defect in enumerate(defects, 1):
            before = time.monotonic()
            found, how = problem(copy, defect)
            survivors += found is not None
            took = time.monotonic() - before
            verdict = f"SURVIVED ({found})" if found else "killed"
            console.print(
                f"{number}/{len(defects)} {took:.0f} s {verdict} {defect.patch.stem}: {defect.sentence}\n    {how}",
                markup=False,
            )
    console.print(f"{len(defects) - survivors} of {len(defects)} killed in {time.monotonic() - started:.0f} s")
    return 1 if survivors or not defects else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
