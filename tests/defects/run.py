"""Plant every defect in a copy of the source, one by one; each must make its tests fail.

A defect is a file in this folder, `NAME.toml`: what is broken, the tests that must notice, the code and its stead.

    sentence = "the salt of the prefix cache does not name the tenant"
    tests = ["tests/server/engine/test_engine.py::test_a_prefix_is_shared_within_tenant_and_gate_and_never_across"]

    [[edit]]
    at = "flexgate.server.engine.protocol.gates:cache_salt"
    find = '[tenant, sorted(experts), client_salt]'
    replace = '[sorted(experts), client_salt]'

`at` is the module and the qualified name of a function or class (`module:Class.method`, `module:outer.inner`), the
module alone for what stands at its top, or the path of a file that is not Python (`kernels/gated_topk/native.c`).
`find` must be there exactly once, and is

- an expression: `tokens > most`, replaced by an expression (`False`);
- or statements, whole ones: `self._check(gate)`, replaced by statements, or by `''`, which deletes them. To add
  a statement, find its neighbour and replace it with both;
- or keyword arguments of a call (`http=BoundedProtocol`) or entries of a dict (`"slots": slots`), likewise.

Code is compared as syntax: comments, line breaks, quotes and parentheses do not matter, and a function that has moved
to another module is found there by its name. Write code in TOML's literal strings: '…', or '''…''' for several lines.
A defect may have several `[[edit]]`. A test named without its `[parameter]` is enough when one parameter fails.

    python tests/defects/run.py [NAME …]         plant these, or all
    python tests/defects/run.py --check          only find every place and test; takes seconds, no test runs
    python tests/defects/run.py --list           names and sentences
    python tests/defects/run.py --slice 2/8 --seed 7       the second eighth of a shuffled list
    python tests/defects/run.py --results FILE   note each verdict; the next run goes on where this one was stopped
    python tests/defects/run.py --workers 2      plant as many at once, each in a copy of its own

The checkout is never touched. A test that cannot be collected or set up has noticed nothing: only one that runs and
fails counts. Exit status 1 if a defect survives or cannot be planted, or a named test fails without any defect.
"""

import argparse
import ast
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from rich.console import Console

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))
from anchors import FOLDERS, AnchorError, Planting  # noqa: E402

TEST_SECONDS = 300  # of one test with a defect; every one of them takes well under a minute without
FAILED = re.compile(r"^FAILED (.+?)( - .*)?$", re.MULTILINE)
console = Console(soft_wrap=True, highlight=False, markup=False)


@dataclass(frozen=True)
class Defect:
    """What is broken, the tests that must each notice, and the edits that break it."""

    name: str
    sentence: str
    tests: tuple[str, ...]
    edits: tuple[dict[str, str], ...]

    @classmethod
    def read(cls, path: Path) -> "Defect":
        """Parse a defect's file."""
        try:
            said = tomllib.loads(path.read_text())
            if not said.keys() <= {"sentence", "tests", "edit"} or not (said["tests"] and said["edit"]):
                raise KeyError("sentence, tests and [[edit]] belong here, nothing else")
            return cls(path.stem, said["sentence"], tuple(said["tests"]), tuple(said["edit"]))
        except (tomllib.TOMLDecodeError, KeyError) as error:
            raise SystemExit(f"{path.name} is not a defect: {error}") from error

    def plant(self, root: Path) -> Planting:
        """The source under `root` with the defect; raises `AnchorError`."""
        planting = Planting(root)
        for edit in self.edits:
            if edit.keys() != {"at", "find", "replace"}:
                raise AnchorError(f"an [[edit]] has at, find and replace, not {', '.join(edit)}")
            planting.replace(**edit)
        return planting

    def missing_tests(self) -> list[str]:
        """The tests that no file defines."""
        return [test for test in self.tests if not _is_defined(*test.partition("[")[0].split("::"))]


def _is_defined(file: str, *names: str) -> bool:
    path = ROOT / file
    tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    return bool(names) and names[-1] in defined


class Copy:
    """A copy of source and tests whose ``flexgate`` package comes before the installed one."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._running: subprocess.Popen[str] | None = None
        self._closed = False
        for name in (*FOLDERS, "benchmarks", "tests", "docs/examples"):
            shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "Makefile", "Dockerfile"):
            shutil.copy(ROOT / name, place / name)
        package = place / "site" / "flexgate"
        package.mkdir(parents=True)
        for name in FOLDERS:
            (package / name).symlink_to(place / name)

    def digest(self) -> str:
        """A hash of every file, by which a verdict is known to be about this source."""
        files = sorted(path for path in self.place.rglob("*") if path.is_file() and path.suffix != ".pyc")
        return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()[:16]

    def test(self, *tests: str, seconds: float | None = None) -> tuple[bool, str]:
        """Whether all of these tests pass, and pytest's words; what does not end in time has not failed either."""
        if not tests:
            return True, ""
        environment = os.environ | {"PYTHONPATH": str(self.place / "site"), "PYTHONSAFEPATH": "1", "COLUMNS": "400"}
        command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", *tests]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        with subprocess.Popen(command, cwd=self.place, env=environment, **pipes) as process:
            self._running = process
            try:
                if self._closed:
                    raise InterruptedError("no more tests are run")
                said, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                self._end()
                return False, f"no end after {seconds:.0f} s"
            except BaseException:
                self._end()
                raise
            finally:
                self._running = None
        return process.returncode == 0, said

    def close(self) -> None:
        """End the tests that run, and run no more."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        """End the process that runs, with whatever it has started."""
        if (process := self._running) is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def survived(self, defect: Defect) -> tuple[str | None, str]:
        """Why this defect counts against the tests, or None; and how they noticed it."""
        try:
            texts = defect.plant(self.place).texts
        except AnchorError as error:
            return str(error), ""
        before = {path: path.read_text() for path in texts}
        seen = []
        try:
            for path, text in texts.items():
                path.write_text(text)
            for test in defect.tests:
                _, said = self.test("-x", test, seconds=TEST_SECONDS)
                failed = FAILED.search(said)
                if failed is None:
                    return f"{test} does not fail", said[-3000:]
                seen.append((failed[2] or "").removeprefix(" - ")[:160])
        finally:
            for path, text in before.items():
                path.write_text(text)
        return None, "; ".join(seen)


def check(defects: list[Defect]) -> int:
    """Find the place and the tests of every defect; 1 if one is missing."""
    wrong = 0
    for defect in defects:
        try:
            notes = defect.plant(ROOT).notes
            problems = [f"there is no test {test}" for test in defect.missing_tests()]
        except AnchorError as error:
            notes, problems = [], [str(error)]
        wrong += bool(problems)
        for line in (*notes, *problems):
            console.print(f"{defect.name}: {line}")
    console.print(f"{len(defects) - wrong} of {len(defects)} can be planted")
    return 1 if wrong or not defects else 0


def plant(defects: list[Defect], results: Path | None, workers: int) -> int:
    """Run the tests of every defect with it, but for those that the results already call killed; 1 if one survives."""
    started, survivors = time.monotonic(), 0
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        copies = [Copy(place / str(number)) for number in range(workers)]
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        stack.callback(_end, pool, copies)
        source = copies[0].digest()
        lines = results.read_text().splitlines() if results and results.exists() else []
        known = {line["defect"] for line in map(json.loads, lines) if line["source"] == source and line["killed"]}
        left = [defect for defect in defects if defect.name not in known]
        tests = sorted({test for defect in left for test in defect.tests})
        console.print(f"{len(defects) - len(left)} known to be killed; {len(tests)} tests without a defect ...")
        for passed, said in pool.map(lambda copy, part: copy.test(*part), copies, by_file(tests, workers)):
            if not passed:
                console.print(said)
                return 1
        free = SimpleQueue[Copy]()
        for copy in copies:
            free.put(copy)
        judging = [pool.submit(_judge, free, defect) for defect in left]
        for number, judged in enumerate(as_completed(judging), 1):
            defect, found, how, took = judged.result()
            survivors += found is not None
            verdict = f"SURVIVED ({found})" if found else "killed"
            console.print(f"{number}/{len(left)} {took} s {verdict} {defect.name}: {defect.sentence}\n    {how}")
            if results:
                line = {
                    "source": source,
                    "defect": defect.name,
                    "killed": not found,
                    "seconds": took,
                    "how": found or how,
                }
                with results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    console.print(f"{len(defects) - survivors} of {len(defects)} killed in {time.monotonic() - started:.0f} s")
    return 1 if survivors or not defects else 0


def _end(pool: ThreadPoolExecutor, copies: list[Copy]) -> None:
    """Let nothing begin that has not begun, and end what runs, as after an interrupt."""
    pool.shutdown(wait=False, cancel_futures=True)
    for copy in copies:
        copy.close()


def by_file(tests: list[str], count: int) -> list[list[str]]:
    """As many parts of about one size, none of which shares a file with another; a part may be empty."""
    files: dict[str, list[str]] = {}
    for test in tests:
        files.setdefault(test.partition("::")[0], []).append(test)
    parts: list[list[str]] = [[] for _ in range(count)]
    for of_file in sorted(files.values(), key=len, reverse=True):
        min(parts, key=len).extend(of_file)
    return parts


def _judge(free: SimpleQueue[Copy], defect: Defect) -> tuple[Defect, str | None, str, int]:
    """Plant a defect in a copy that is free: what counts against the tests, how they noticed it, and the seconds."""
    copy, before = free.get(), time.monotonic()
    try:
        found, how = copy.survived(defect)
    finally:
        free.put(copy)
    return defect, found, how, round(time.monotonic() - before)


def chosen(names: list[str], part: str, seed: int) -> list[Defect]:
    """The named defects, or a slice of all."""
    folder = Path(__file__).parent
    if strays := sorted(path.name for path in folder.iterdir() if path.suffix not in (".toml", ".py", "")):
        raise SystemExit(f"not a defect: {', '.join(strays)}; the head of run.py describes the form, NAME.toml")
    paths = sorted(folder.glob("*.toml"))
    if unknown := set(names) - {path.stem for path in paths}:
        raise SystemExit(f"no such defect: {', '.join(sorted(unknown))}")
    number, _, count = part.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise SystemExit(f"--slice is K/N, the Kth of N parts, such as 2/8, not '{part}'")
    order = paths.copy()
    random.Random(seed).shuffle(order)
    mine = set(order[int(number) - 1 :: int(count)])
    return [Defect.read(path) for path in paths if path in mine and (not names or path.stem in names)]


def main() -> int:
    """Read the command line and do as it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--slice", default="1/1", metavar="K/N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, metavar="FILE")
    parser.add_argument("--workers", type=int, default=1, metavar="N")
    options = parser.parse_args()
    defects = chosen(options.names, options.slice, options.seed)
    if options.list:
        for defect in defects:
            console.print(f"{defect.name}: {defect.sentence}")
        return 0
    if options.workers < 1:
        parser.error(f"--workers is a number from 1, not {options.workers}")
    # SIGINT is ignored in what a script starts in the background, and `timeout` sends SIGTERM.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    return check(defects) if options.check else plant(defects, options.results, options.workers)


if __name__ == "__main__":
    sys.exit(main())
