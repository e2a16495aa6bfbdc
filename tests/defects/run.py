"""Apply every planted defect to a copy of the source, one by one; each must make a test fail.

Usage: ``python tests/defects/run.py [NAME …]``. A patch in this folder begins with the sentence that
says what is broken and the pytest selections that must notice:

    Defect: the guard leaves the client's cache salt as it is
    Test: tests/server/engine/test_engine.py -k prefix

The checkout is never touched. Exit status 1 if a defect survives, a patch no longer applies, or a
selected test fails without any defect.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).parents[2]
FOLDERS = ("policies", "kernels", "experts", "server")
NOTHING_COLLECTED = 5
console = Console()


@dataclass(frozen=True)
class Defect:
    """One patch, what it breaks, and the tests that must fail with it."""

    patch: Path
    sentence: str
    selections: tuple[tuple[str, ...], ...]

    @classmethod
    def read(cls, patch: Path) -> "Defect":
        """Parse the head of a patch."""
        head = patch.read_text().split("--- ", 1)[0].splitlines()
        sentence = next(line.removeprefix("Defect: ") for line in head if line.startswith("Defect: "))
        tests = [line.removeprefix("Test: ") for line in head if line.startswith("Test: ")]
        return cls(patch, sentence, tuple(tuple(shlex.split(test)) for test in tests))


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

    def test(self, selection: tuple[str, ...]) -> int:
        """pytest's exit status for one selection."""
        environment = os.environ | {"PYTHONPATH": str(self.place / "site"), "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *selection]
        return subprocess.run(command, cwd=self.place, env=environment, capture_output=True).returncode


def problem(copy: Copy, defect: Defect) -> str | None:
    """Why this defect counts against us, or None if every selected test noticed it."""
    if not copy.apply(defect.patch):
        return "the patch does not apply"
    try:
        for selection in defect.selections:
            status = copy.test(selection)
            if status in (0, NOTHING_COLLECTED):
                return f"survived {shlex.join(selection)}"
    finally:
        if not copy.apply(defect.patch, undo=True):
            raise SystemExit(f"{defect.patch.name} could not be taken back")
    return None


def main(names: list[str]) -> int:
    """Run the named defects, or all of them."""
    defects = [Defect.read(patch) for patch in sorted(Path(__file__).parent.glob("*.patch"))]
    if names:
        defects = [defect for defect in defects if defect.patch.stem in names]
    problems: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as place:
        copy = Copy(Path(place))
        selections = sorted({selection for defect in defects for selection in defect.selections})
        for selection in track(selections, "without defects", console=console):
            if copy.test(selection) != 0:
                problems[shlex.join(selection)] = "fails without any defect"
        for defect in track(defects, "with each defect", console=console):
            found = problem(copy, defect)
            if found is not None:
                problems[defect.patch.stem] = found
            console.print(f"{'SURVIVED' if found else 'killed'}  {defect.patch.stem}: {defect.sentence}")
    for name, found in problems.items():
        console.print(f"[red]{name}: {found}")
    console.print(f"{len(defects) - len(problems)} of {len(defects)} defects killed")
    return 1 if problems or not defects else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
