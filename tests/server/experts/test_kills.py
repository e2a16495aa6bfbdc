"""A seeded slice of the kills; the whole is ``make expert-kills``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def kills(count: int, seed: int) -> tuple[int, dict[str, object]]:
    """In a process of its own, since it forks."""
    path = os.pathsep.join(
        filter(None, (str(ROOT / "benchmarks"), str(ROOT / "tests/support"), os.environ.get("PYTHONPATH")))
    )
    environment = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "kills.experts", f"--kills={count}", f"--seed={seed}"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    return run.returncode, json.loads(run.stdout[run.stdout.index("{") :])


def assert_nothing_half_done(count: int, seed: int) -> None:
    status, report = kills(count, seed)
    assert (status, report["kills"], report["neither_old_nor_new"]) == (0, count, [])


def test_a_killed_server_comes_back_to_the_old_or_the_new_state() -> None:
    assert_nothing_half_done(12, seed=7)


@pytest.mark.slow
@pytest.mark.sliced(1)
@pytest.mark.parametrize("seed", range(8, 13))
def test_a_server_killed_at_other_moments_comes_back_to_the_old_or_the_new_state(seed: int) -> None:
    assert_nothing_half_done(30, seed)
