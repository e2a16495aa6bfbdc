"""A slice is chosen by its seed alone, and without a seed everything runs."""

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parents[1] / "support"
CONFTEST = """
import slices

def pytest_addoption(parser):
    slices.add_option(parser)

def pytest_collection_modifyitems(config, items):
    slices.keep(config, items)
"""
TESTS = """
import pytest

@pytest.mark.sliced(3)
@pytest.mark.parametrize("case", range(20))
def test_cases(case): pass

@pytest.mark.sliced(1, of="kernels", family="engines")
@pytest.mark.parametrize("kernels", ["ours", "theirs"])
@pytest.mark.parametrize("case", range(2))
def test_one(kernels, case): pass

@pytest.mark.sliced(1, of="kernels", family="engines")
@pytest.mark.parametrize("kernels", ["ours", "theirs"])
def test_other(kernels): pass

def test_always(): pass
"""


def collected(folder: Path, *options: str) -> list[str]:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(TESTS)
    path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return [line.split("::")[1] for line in done.stdout.splitlines() if "::" in line]


def test_without_a_seed_every_case_is_collected(tmp_path: Path) -> None:
    assert len(collected(tmp_path)) == 20 + 4 + 2 + 1


def test_a_seed_chooses_so_many_cases_and_always_the_same(tmp_path: Path) -> None:
    first = collected(tmp_path, "--slice=a")
    assert first == collected(tmp_path, "--slice=a")
    assert len([name for name in first if "test_cases" in name]) == 3
    assert "test_always" in first


def test_other_seeds_choose_other_cases(tmp_path: Path) -> None:
    chosen = {name for seed in range(5) for name in collected(tmp_path, f"--slice={seed}")}
    assert len([name for name in chosen if "test_cases" in name]) > 5


def test_tests_of_a_family_choose_the_same_value(tmp_path: Path) -> None:
    found = [name for name in collected(tmp_path, "--slice=a") if name.startswith(("test_one", "test_other"))]
    assert len(found) == 3
    assert len({"theirs" in name for name in found}) == 1
