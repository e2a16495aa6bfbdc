"""Grades that are found by comparing checkpoints, each made as models of that grade are made."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packagekit import ONE, make_package, write_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flexgate.experts.checkpoint.base import base_identity
from flexgate.experts.cli.main import app
from flexgate.experts.package.merge import combine
from flexgate.experts.package.verify import open_package

NORM = "model.layers.1.post_attention_layernorm.weight"
Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Path]:
    """An anchor, the owners' pairs `a`, `b` and `c`, and the merge of all three."""
    write_model(tmp_path / "anchor")
    with ExitStack() as stack:
        opened = {}
        for seed, name in enumerate("abc", start=1):
            make_package(tmp_path / f"package-{name}", tmp_path / "anchor", expert=name, seed=seed, biased=name == "b")
            private = tmp_path / f"private-{name}"
            path, base = tmp_path / f"package-{name}", base_identity(tmp_path / "anchor")
            opened[name] = stack.enter_context(open_package(path, base=base, trusted_keys=None, into=private))
            combine(tmp_path / "anchor", [opened[name]], tmp_path / name, top_k=2)
        combine(tmp_path / "anchor", [*opened.values()], tmp_path / "merged", top_k=2)
        yield tmp_path


def edit(model: Path, change: Edit) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def graded(family: Path, *siblings: str, model: str = "merged") -> dict[str, str]:
    paths = [str(family / name) for name in (model, *siblings)]
    result = CliRunner().invoke(app, ["grade", *paths, "--json"])
    assert result.exit_code == 0, result.output
    return {row["id"]: row["grade"] for row in json.loads(result.stdout)["experts"]}


def test_experts_that_were_merged_as_they_were_made_are_removed_whole(family: Path) -> None:
    assert graded(family, "a", "b", "c") == dict.fromkeys("abc", "removed")


def tune(rows: slice) -> Edit:
    def change(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.gate.weight"][rows] += 1

    return change


def test_a_tuned_router_keeps_something_of_every_expert_but_the_one_that_was_tuned_alone(family: Path) -> None:
    edit(family / "merged", tune(slice(3, 4)))
    assert graded(family, "a", "b", "c") == {"a": "router", "b": "router", "c": "removed"}
    edit(family / "merged", tune(slice(1, 3)))
    assert graded(family, "a", "b", "c") == dict.fromkeys("abc", "router")


def test_a_router_bias_is_a_part_of_the_router(family: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.mlp.gate.bias"][2] -= 1

    edit(family / "merged", change)
    assert graded(family, "a", "b", "c") == {"a": "router", "b": "removed", "c": "router"}


@pytest.mark.parametrize("name", [NORM, "model.layers.0.mlp.experts.0.up_proj.weight", "model.embed_tokens.weight"])
def test_shared_weights_that_were_averaged_keep_something_of_every_expert(family: Path, name: str) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name] *= 1.5

    edit(family / "merged", change)
    assert graded(family, "a", "b", "c", "anchor") == dict.fromkeys("abc", "shared")


def test_shared_weights_of_one_expert_keep_something_of_it_alone(family: Path) -> None:
    """The weights are those of a checkpoint that lacks the other experts."""

    def change(tensors: dict[str, Any]) -> None:
        tensors[NORM] *= 1.5

    edit(family / "merged", change)
    edit(family / "c", change)
    assert graded(family, "a", "b", "c", "anchor") == {"a": "removed", "b": "removed", "c": "shared"}


def test_an_expert_that_every_sibling_has_is_not_graded(family: Path) -> None:
    assert graded(family, "a", model="a") == {"a": "unknown"}
    assert graded(family, "anchor", model="a") == {"a": "removed"}


def test_an_expert_of_unknown_origin_leaves_the_others_ungraded(family: Path) -> None:
    """Its weights may have learnt from theirs."""
    assert graded(family, "a", "b", "anchor") == {"a": "unknown", "b": "unknown", "c": "removed"}


def refusal(*words: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["grade", *map(str, words)])
    return result.exit_code, result.stderr


def test_what_is_no_sibling_is_refused(family: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "wide", replace(ONE, intermediate_size=16))
    status, said = refusal(family / "merged", family / "a", tmp_path / "wide")
    assert (status, said) == (
        1,
        f"error: {tmp_path}/wide is not a sibling of the model: intermediate_size is 16, expected 12\n",
    )
    write_model(tmp_path / "half", dtype="bfloat16")
    assert "is not a sibling of the model: it is stored as BF16" in refusal(family / "merged", tmp_path / "half")[1]


def test_a_sibling_is_named_once(family: Path) -> None:
    status, said = refusal(family / "merged", family / "a", family / "a")
    assert (status, "a checkpoint is given twice" in said) == (2, True)


def test_the_table_says_what_it_was_found_by(family: Path) -> None:
    edit(family / "merged", tune(slice(3, 4)))
    result = CliRunner().invoke(app, ["grade", *(str(family / name) for name in ("merged", "a", "b", "c"))])
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["id", "grade", "because"]
    assert lines[1].endswith("the router rows of expert 3 are other ones than without this expert")
    assert lines[3].endswith(f"all else is as in {family}/a, {family}/b")
