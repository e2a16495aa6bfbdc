"""`make verify` reports per commit and machine, and goes on where it was stopped."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[1] / "verify.py"


@pytest.fixture
def verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program over a repository of its own, with steps that note when they run and fail when told."""
    spec = importlib.util.spec_from_file_location("flexgate_verify", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "flexgate_verify", module)
    spec.loader.exec_module(module)
    root = tmp_path / "repository"
    root.mkdir()
    (root / ".gitignore").write_text("build/\n")
    monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(module, "FOLDER", root / "build" / "verify")
    steps = {name: f"echo {name} >> {tmp_path}/ran; echo 3 passed; test ! -e {tmp_path}/{name}" for name in ("a", "b")}
    monkeypatch.setattr(module, "STEPS", steps)
    git(root, "init", "-q")
    commit(root)
    return module


def git(root: Path, *arguments: str) -> None:
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", *who, *arguments], cwd=root, check=True)


def commit(root: Path) -> None:
    git(root, "add", "-A")
    git(root, "commit", "-q", "--allow-empty", "-m", "next")


def ran(tmp_path: Path) -> list[str]:
    return (tmp_path / "ran").read_text().split()


def reports(verify: Any) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(verify.FOLDER.glob("*.json"))]


def test_a_failed_step_runs_again_and_a_passed_one_does_not(verify: Any, tmp_path: Path) -> None:
    (tmp_path / "b").touch()
    assert verify.main([]) == 1
    (report,) = reports(verify)
    assert (report["steps"]["a"]["passed"], report["steps"]["b"]["passed"]) == (True, False)
    assert not report["everything_passed"]
    (tmp_path / "b").unlink()
    assert verify.main([]) == 0
    assert ran(tmp_path) == ["a", "b", "b"]
    (report,) = reports(verify)
    assert report["everything_passed"]
    assert report["steps"]["b"]["counts"] == {"passed": 3}
    assert {"name", "processor", "cores", "python"} == report["machine"].keys()


def test_another_commit_runs_everything_again(verify: Any, tmp_path: Path) -> None:
    assert verify.main([]) == 0
    commit(verify.ROOT)
    assert verify.main([]) == 0
    assert ran(tmp_path) == ["a", "b", "a", "b"]
    assert len({report["commit"] for report in reports(verify)}) == 2


def test_one_step_does_not_make_everything_passed(verify: Any, tmp_path: Path) -> None:
    assert verify.main(["b"]) == 0
    (report,) = reports(verify)
    assert not report["everything_passed"]


def test_changes_that_no_commit_holds_are_refused(verify: Any) -> None:
    (verify.ROOT / "new").touch()
    with pytest.raises(SystemExit, match="commit or stash first"):
        verify.main([])


def test_an_unknown_step_is_refused_with_those_there_are(verify: Any) -> None:
    with pytest.raises(SystemExit, match="no step c; there are a, b"):
        verify.main(["c"])


def test_a_step_of_many_files_goes_on_where_it_was_stopped(
    verify: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = verify.ROOT / "tests/server/engine"
    tests.mkdir(parents=True)
    for name in ("test_a", "test_b", "test_c"):
        (tests / f"{name}.py").write_text("pytestmark = pytest.mark.engine\n")
    (tests / "test_other.py").touch()
    commit(verify.ROOT)
    step = f"f={{part}}; basename $f >> {tmp_path}/ran; echo 2 passed; test ! -e {tmp_path}/$(basename $f)"
    monkeypatch.setattr(verify, "STEPS", {"repeated": step})
    (tmp_path / "test_b.py").touch()
    assert verify.main([]) == 1
    (tmp_path / "test_b.py").unlink()
    assert verify.main([]) == 0
    assert ran(tmp_path) == ["test_a.py", "test_b.py", "test_c.py", "test_b.py"]
    assert reports(verify)[0]["steps"]["repeated"]["counts"] == {"passed": 6}
