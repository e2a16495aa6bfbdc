"""The tuner, dry: the interpreter computes, nothing is timed, and the first accepted configuration wins."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexgate.kernels.bench.place import Place, interpreter
from flexgate.kernels.bench.tune import MOST, SPACE, Bound, Cut, tune, write_table
from flexgate.kernels.gated_experts.tiles import read_tile_table
from flexgate.kernels.testing.configurations import Shape

SMALL = Shape(hidden=32, intermediate=32, slots=2, top_k=1)
TINY_SPACE: dict[Bound, list[Cut]] = {
    16: [(16, 128, 1, 4, 2), (16, 64, 1, 4, 2)],
    None: [(32, 64, 2, 4, 9), (16, 64, 2, 4, 2)],
}


class Spoiled:
    """Gate and up by tiles of 128 rows with one bit changed; nine stages do not fit."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            if constants["num_stages"] == 9:
                raise MemoryError("out of resource: shared memory")
            self.kernel[grid](*arguments, **constants)
            if constants["BLOCK_N"] == 128:
                arguments[2][:, 0] *= 1.01

        return launch


@pytest.fixture
def spoiled() -> Place:
    place = interpreter()
    return replace(place, experts=replace(place.experts, gate_up=Spoiled(place.experts.gate_up)))


@pytest.mark.slow
def test_a_configuration_that_changes_bits_or_cannot_run_is_not_accepted(spoiled: Place, tmp_path: Path) -> None:
    buckets, tried = tune(spoiled, SMALL, 32, TINY_SPACE)
    refused = [trial.refused for trials in tried.values() for trial in trials]
    assert refused[::2] == ["changes bits", "", "MemoryError: out of resource: shared memory", ""]
    assert refused[1::2] == [""] * 4
    assert [(tiles.max_tokens, tiles.block_t, tiles.gate_up.block_n) for tiles in buckets] == [
        (16, 16, 64),
        (None, 16, 64),
    ]
    path = write_table(spoiled, SMALL, buckets, tried, tmp_path)
    assert path.name == "H=32,F=32,bfloat16,interpreter.json"
    table = read_tile_table(path)
    assert (table.origin, list(table.buckets)) == ("seed", buckets)
    assert json.loads(path.read_text())["tried"][0]["refused"] == "changes bits"


def test_where_none_is_accepted_the_tuner_says_so(spoiled: Place) -> None:
    with pytest.raises(ValueError, match="no configuration for batches up to 16 was accepted"):
        tune(spoiled, SMALL, 32, {16: [(16, 128, 1, 4, 2)]})


@pytest.mark.slow
def test_a_table_that_fails_a_bit_check_is_not_written(spoiled: Place, tmp_path: Path) -> None:
    buckets, tried = tune(interpreter(), SMALL, 32, {None: [(16, 64, 1, 4, 2)], 16: [(16, 128, 1, 4, 2)]})
    with pytest.raises(ValueError, match="fails tiles up to T=16 = tiles up to T=None"):
        write_table(spoiled, SMALL, buckets, tried, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_space_of_more_than_forty_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 40"):
        tune(interpreter(), SMALL, 32, {None: [(16, 64, 1, 4, stages) for stages in range(1, 42)]})


def test_the_shipped_space_is_small_ends_unbounded_and_splits_nothing() -> None:
    cuts = [cut for bucket in SPACE.values() for cut in bucket]
    assert len(cuts) <= MOST == 40
    assert list(SPACE) == [16, 32, 128, 512, None]
    assert all(block_t >= 16 and block_n >= 64 and warps in (4, 8) for block_t, block_n, _, warps, _ in cuts)
    assert all(len(set(bucket)) == len(bucket) for bucket in SPACE.values())
