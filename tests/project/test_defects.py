"""Planted defects find their place whatever the layout of the source, and `tests/defects/run.py` judges them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from anchors import AnchorError, Planting, replaced

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # the plugins take longer than these tests
MODULE = """
MOST = 3

def limit(tokens, most):
    if (tokens  # as counted
            > most):
        raise ValueError('too many')
    return min(tokens, most)

class Gate:
    def check(self):
        self.owner(); self.seal()
        return call(a=1, b=2), {"x": 1, **more, "y": 2}
"""


def run(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "tests/defects/run.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=ENVIRONMENT)


def test_every_defect_can_be_planted_and_names_tests_that_exist() -> None:
    done = run(ROOT, "--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "find", "replace", "expected"),
    [
        ("limit", "tokens > most", "False", "if False:"),
        ("limit", 'raise ValueError("too many")', "", "if tokens > most:\n        pass"),
        ("limit", "return min(tokens, most)", "tokens += 1\nreturn tokens", "    tokens += 1\n    return tokens"),
        ("Gate.check", "self.seal()", "", "self.owner()\n        return"),
        ("Gate.check", "self.owner()\nself.seal()", "self.seal()", "self):\n        self.seal()\n        return"),
        ("Gate.check", "b=2", "", "call(a=1)"),
        ("Gate.check", "b = 2,", "b=3, c=4", "call(a=1, b=3, c=4)"),
        ("Gate.check", "**more", "", "{'x': 1, 'y': 2}"),
        ("Gate.check", '"y": 2', '"y": 3', "{'x': 1, **more, 'y': 3}"),
        ("", "tokens > most", "tokens >= most", "tokens >= most"),
    ],
)
def test_code_is_found_by_its_syntax_whatever_its_form(name: str, find: str, replace: str, expected: str) -> None:
    assert expected in replaced(MODULE, name, find, replace)


@pytest.mark.parametrize(
    ("at", "find", "replace", "said"),
    [
        ("flexgate.server.a:limit", "tokens < most", "False", "found 0 times as an expression"),
        ("flexgate.server.a:limit", "tokens", "0", "found 2 times as an expression (lines 5, 8), write more of it"),
        ("flexgate.server.a:limit", "tokens > most", "(tokens >\nmost)", "nothing changes"),
        ("flexgate.server.a:limit", "tokens > most", "pass", "found 0 times as statements"),
        ("flexgate.server.a:limit", "tokens >", "False", "'find' and 'replace' must be Python of one kind"),
        ("flexgate.server.a:gone", "tokens < most", "0", "is not there, and no other module has it with this code"),
        ("flexgate.server.b:gone", "x", "y", "is not there, and no other module has it with this code"),
        ("server/a.c", "int x;", "", "found 2 times, not once"),
    ],
)
def test_what_cannot_be_planted_is_said_with_what_was_looked_for_and_where(
    tmp_path: Path, at: str, find: str, replace: str, said: str
) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server/a.py").write_text(MODULE)
    (tmp_path / "server/a.c").write_text("int x; int  x;")
    with pytest.raises(AnchorError) as error:
        Planting(tmp_path).replace(at, find, replace)
    assert str(error.value).startswith(f"{at}: {said}")
    assert str(error.value).endswith(f"; looked for:\n    {find}")


def test_a_function_that_has_moved_is_found_and_the_move_is_said(tmp_path: Path) -> None:
    (tmp_path / "server/limits").mkdir(parents=True)
    (tmp_path / "server/limits/__init__.py").write_text(MODULE)
    planting = Planting(tmp_path)
    planting.replace("flexgate.server.a:limit", "tokens > most", "False")
    assert planting.notes == ["flexgate.server.a:limit: has moved to flexgate.server.limits; correct 'at'"]
    assert list(planting.texts) == [tmp_path / "server/limits/__init__.py"]


def test_a_second_edit_of_a_file_keeps_the_first(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server/a.py").write_text(MODULE)
    planting = Planting(tmp_path)
    planting.replace("flexgate.server.a:limit", "tokens > most", "False")
    planting.replace("flexgate.server.a:Gate.check", "self.seal()", "")
    (text,) = planting.texts.values()
    assert "if False:" in text
    assert "seal" not in text


def small_project(root: Path) -> None:
    """A project of one function with a test that holds it and one that does not."""
    for folder in ("policies", "kernels", "experts", "server", "benchmarks"):
        (root / folder).mkdir(parents=True)
        (root / folder / "__init__.py").touch()
    (root / "server/a.py").write_text(MODULE)
    for name in ("pyproject.toml", "README.md", "Makefile", "Dockerfile"):
        (root / name).touch()
    (root / "docs/examples").mkdir(parents=True)
    shutil.copytree(ROOT / "tests/support", root / "tests/support", ignore=lambda _, names: {*names} - {"anchors.py"})
    (root / "tests/defects").mkdir()
    shutil.copy(ROOT / "tests/defects/run.py", root / "tests/defects/run.py")
    (root / "tests/test_a.py").write_text(
        "import pytest\nfrom flexgate.server.a import limit\n"
        "def test_holds():\n    with pytest.raises(ValueError): limit(3, 2)\n"
        "def test_holds_not():\n    assert limit(1, 2) == 1\n"
    )


def defect(root: Path, name: str, test: str, find: str, replace: str, *, module: str = "a") -> None:
    """Write a defect of a module of `small_project`."""
    (root / f"tests/defects/{name}.toml").write_text(
        f'sentence = "{name}"\ntests = ["tests/{test}"]\n'
        f"[[edit]]\nat = 'flexgate.server.{module}'\nfind = '{find}'\nreplace = '{replace}'\n"
    )


@pytest.mark.parametrize("workers", ["1", "2"])
def test_only_a_test_that_runs_and_fails_counts_and_a_run_goes_on_where_it_was_stopped(
    tmp_path: Path, workers: str
) -> None:
    root, results = tmp_path / "project", tmp_path / "results"
    small_project(root)
    defect(root, "held", "test_a.py::test_holds", "tokens > most", "False")
    defect(root, "not-held", "test_a.py::test_holds_not", "tokens > most", "False")
    defect(root, "not-collected", "test_a.py::test_holds", "MOST = 3", "MOST = 1 / 0")
    first = run(root, "--results", str(results), "--workers", workers)
    verdicts = {line["defect"]: line["killed"] for line in map(json.loads, results.read_text().splitlines())}
    assert verdicts == {"held": True, "not-held": False, "not-collected": False}, first.stdout + first.stderr
    assert first.returncode == 1
    assert (root / "server/a.py").read_text() == MODULE
    again = run(root, "--results", str(results), "--workers", workers, "held")
    assert "1 known to be killed; 0 tests" in again.stdout
    assert again.returncode == 0


def test_defects_that_are_planted_at_once_are_not_in_one_copy(tmp_path: Path) -> None:
    """Each test waits for the other's, and sees no more than its own defect."""
    root, met = tmp_path / "project", tmp_path / "met"
    small_project(root)
    met.mkdir()
    (root / "server/b.py").write_text("MOST = 3\n")
    (root / "tests/test_b.py").write_text(
        "import os, time\nfrom pathlib import Path\nfrom flexgate.server.a import MOST as a\n"
        f"from flexgate.server.b import MOST as b\nmet = Path({str(met)!r})\n"
        "def test_both():\n    if (a, b) == (3, 3): return\n"
        "    (met / f'{a}{b}').touch()\n    until = time.monotonic() + 60\n"
        "    while len(os.listdir(met)) < 2 and time.monotonic() < until: time.sleep(0.01)\n"
        "    assert sorted(os.listdir(met)) != ['34', '43']\n"
    )
    for name, module in (("one", "a"), ("other", "b")):
        defect(root, name, "test_b.py::test_both", "MOST = 3", "MOST = 4", module=module)
    done = run(root, "--workers", "2")
    assert sorted(path.name for path in met.iterdir()) == ["34", "43"], done.stdout + done.stderr
    assert "2 of 2 killed" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_leaves_no_test_running(tmp_path: Path, number: signal.Signals) -> None:
    root, begun = tmp_path / "project", tmp_path / "begun"
    small_project(root)
    (root / "tests/test_b.py").write_text(
        "import os, time\nfrom pathlib import Path\nfrom flexgate.server.a import MOST\n"
        f"def test_waits():\n    if MOST == 3: return\n    Path({str(begun)!r}).write_text(str(os.getpid()))\n"
        "    time.sleep(300)\n"
    )
    defect(root, "slow", "test_b.py::test_waits", "MOST = 3", "MOST = 4")
    command = [sys.executable, str(root / "tests/defects/run.py"), "--workers", "2"]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            until = time.monotonic() + 100
            while not (begun.exists() and begun.read_text()):
                assert time.monotonic() < until
                assert process.poll() is None, process.stdout
                time.sleep(0.01)
            process.send_signal(number)
            process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(begun.read_text()), 0)
