"""Tile tables: the shipped ones are valid, and a table that could change results is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from flexgate.kernels.errors import KernelConfigError
from flexgate.kernels.gated_experts import tiles
from flexgate.kernels.gated_experts.tiles import TUNING, read_tile_table, tile_table

FILES = sorted(TUNING.glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_tables_are_valid_and_say_where_they_come_from(path: Path) -> None:
    table = read_tile_table(path)
    assert table.name == path.stem
    assert table.origin in ("seed", "measured")


def test_the_most_specific_table_is_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tiles, "TUNING", tmp_path)
    table = (TUNING / "default.json").read_text(encoding="utf-8")
    for name in ("H=4096,F=11008,bfloat16,NVIDIA_H200", "default,sm_90", "default"):
        (tmp_path / f"{name}.json").write_text(table, encoding="utf-8")
    chosen = tile_table.__wrapped__
    assert chosen(4096, 11008, "bfloat16", "NVIDIA_H200", "sm_90").name == "H=4096,F=11008,bfloat16,NVIDIA_H200"
    assert chosen(4096, 11008, "bfloat16", "NVIDIA_H100", "sm_90").name == "default,sm_90"
    assert chosen(512, 1408, "bfloat16", "NVIDIA_H200", "sm_90").name == "default,sm_90"
    assert chosen(4096, 11008, "bfloat16", "NVIDIA_L4", "sm_89").name == "default"


def test_the_smallest_bucket_that_holds_the_batch_is_chosen() -> None:
    table = tile_table(4096, 11008, "bfloat16", "NVIDIA_H200", "sm_90")
    chosen = [table.choose(tokens).max_tokens for tokens in (1, 16, 17, 32, 33, 128, 129, 512, 513, 100_000)]
    assert chosen == [16, 16, 32, 32, 128, 128, 512, 512, None, None]


def test_a_missing_table_is_an_error_that_says_what_was_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tiles, "TUNING", tmp_path)
    with pytest.raises(KernelConfigError, match="looked for H=1,F=2,float32,X, default,Y, default"):
        tile_table(1, 2, "float32", "X", "Y")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["origin"], "guess", 'origin must be "seed" or "measured"'),
        (["buckets"], [], "max_tokens must ascend and end with null"),
        (["buckets", 0, "max_tokens"], None, "max_tokens must ascend"),
        (["buckets", 0, "max_tokens"], 64, "max_tokens must ascend"),
        (["buckets", 0, "block_t"], 8, "needs block_t >= 16"),
        (["buckets", 0, "block_t"], 24, "must be powers of two"),
        (["buckets", 0, "down", "block_n"], 32, "needs block_t >= 16, block_n >= 64"),
        (["buckets", 0, "down", "block_d"], 32, "block_d must be the same in every bucket"),
        (["buckets", 0, "gate_up", "warps"], 2, "needs 4 or 8 warps"),
        (["buckets", 0, "gate_up", "split_k"], 2, "split_k"),
        (["buckets", 0, "gate_up"], {}, "missing 5 required"),
    ],
)
def test_a_table_that_breaks_the_contract_is_refused(tmp_path: Path, path: list[Any], value: Any, message: str) -> None:
    stored = copy.deepcopy(json.loads((TUNING / "default,sm_90.json").read_text(encoding="utf-8")))
    parent = stored
    for step in path[:-1]:
        parent = parent[step]
    parent[path[-1]] = value
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(KernelConfigError, match=message):
        read_tile_table(broken)
