"""A step of an addition or a revocation raises: the state is the old or the new one, and the next change works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kills.experts import World, build_world
from kills.faults import POINTS, trial


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("faults", [1, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("point", POINTS)
def test_a_fault_leaves_the_old_or_the_new_state_and_the_next_change_works(
    world: World, tmp_path: Path, point: str, faults: int
) -> None:
    verdicts: list[dict[str, Any]] = []
    while sum(verdict["fired"] for verdict in verdicts) < faults:
        assert len(verdicts) < 20 * faults, "the step is not reached"
        verdicts.append(trial(world, tmp_path / str(len(verdicts)), point, seed=len(verdicts)))
    assert [verdict for verdict in verdicts if verdict["wrong"]] == []
