"""Slices of what `make verify` runs whole by a program of its own: planted defects, mutants of the decision code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
DEFECTS = len(list((TESTS / "defects").glob("*.toml")))
DEFECT_SLICES = DEFECTS // 8  # as many of each commit, however many there are
MUTANT_SLICES = 60
pytestmark = [pytest.mark.slow, pytest.mark.sliced(1)]


def assert_ends_well(program: str, part: int, parts: int) -> None:
    command = [sys.executable, str(TESTS / program), f"--slice={part}/{parts}"]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


@pytest.mark.parametrize("part", range(1, DEFECT_SLICES + 1))
def test_tests_notice_every_planted_defect(part: int) -> None:
    assert_ends_well("defects/run.py", part, DEFECT_SLICES)


@pytest.mark.parametrize("part", range(1, MUTANT_SLICES + 1))
def test_tests_notice_mutants_of_the_decision_code(part: int) -> None:
    assert_ends_well("policies/mutate.py", part, MUTANT_SLICES)
