"""Training factors beside the public FFN: what moves, what is written, what a killed run loses, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packagekit import statement
from trainkit import OPTIONS, PLAN, write_owner

from flexgate.experts.checkpoint.base import base_identity
from flexgate.experts.checkpoint.reader import read_checkpoint
from flexgate.experts.errors import SizeInvalid, TrainingRefused
from flexgate.experts.package.merge import combine
from flexgate.experts.package.verify import open_package
from flexgate.experts.training import loop
from flexgate.experts.training.loop import Outcome, Run
from flexgate.experts.training.low_rank import LowRankFFN, use_factors
from flexgate.experts.training.model import FlexOlmo
from flexgate.experts.training.pair import Row, make_pair, public_rows, trainable
from flexgate.experts.training.parallel import World
from flexgate.experts.training.train_expert import ExpertOptions, load_anchor, train_expert

RANK = replace(OPTIONS, rank=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Public and own texts, and an anchor."""
    root = tmp_path_factory.mktemp("training")
    write_owner(root)
    return root


@pytest.fixture
def train(folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """Train into a folder of this test."""

    def run(name: str, options: ExpertOptions = RANK, **more: Any) -> Any:
        said = statement("zorp")
        return train_expert(
            folder / "anchor", folder / "own", folder / "public", tmp_path / name, said, options, **more
        )

    return run


def test_a_trained_rank_is_a_package_that_merges_to_what_was_trained(
    train: Callable[..., Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs: list[FlexOlmo] = []

    def kept(pair: FlexOlmo, *arguments: Any) -> None:
        use_factors(pair, *arguments)
        pairs.append(pair)

    monkeypatch.setattr("flexgate.experts.training.train_expert.use_factors", kept)
    before = {path.name: path.read_bytes() for path in (folder / "anchor").iterdir()}
    manifest, _ = train("e")
    assert (manifest.rank, manifest.format) == (3, "flexgate-expert/2")
    assert manifest.training.recipe["rank"] == "3"
    base = base_identity(folder / "anchor")
    with open_package(tmp_path / "e", base=base, trusted_keys=None, into=tmp_path / "copy") as package:
        combine(folder / "anchor", [package], tmp_path / "model", top_k=2)
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        merged = FlexOlmo.from_tensors(*read_checkpoint(tmp_path / "model"))(tokens)
        torch.testing.assert_close(merged, pairs[0](tokens), atol=2e-5, rtol=1e-5)
        assert not torch.allclose(merged, load_anchor(folder / "anchor")(tokens), atol=1e-2)
    assert {path.name: path.read_bytes() for path in (folder / "anchor").iterdir()} == before
    assert not (tmp_path / ".e.training").exists()


def test_factors_learn_what_the_owners_texts_say(train: Callable[..., Any]) -> None:
    def loss(name: str, **plan: Any) -> float:
        outcome: Outcome = train(name, replace(RANK, plan=replace(PLAN, **plan)))[1]
        return outcome.held_out_loss

    untrained = loss("untrained", steps=1, peak=1e-9)
    assert loss("trained", steps=40, peak=2e-2, evaluate_every=10) < untrained - 0.1


def test_training_starts_from_the_public_expert_and_only_factors_are_in_the_graph(folder: Path) -> None:
    anchor = load_anchor(folder / "anchor")
    rows = [Row(row.clone()) for row in public_rows(anchor)]
    pair, full = make_pair(anchor, rows), make_pair(anchor, rows)
    use_factors(pair, 3, seed=0)
    tokens = torch.arange(12).view(1, 12)
    assert torch.equal(pair(tokens), full(tokens))
    named = trainable(pair, [1], train_router=False)
    projections = ("gate_proj", "up_proj", "down_proj")
    assert {*named} == {f"1.ffn.{name}.lora_{part}" for name in projections for part in "AB"}
    frozen = {name: value.clone() for name, value in pair.named_parameters() if ".experts.0." in name}
    pair(tokens).square().mean().backward()
    assert {id(p) for p in pair.parameters() if p.grad is not None} == {id(p) for p in named.values()}
    assert all(torch.equal(dict(pair.named_parameters())[name], value) for name, value in frozen.items())


def test_layers_that_are_not_trained_add_nothing(train: Callable[..., Any], tmp_path: Path) -> None:
    train("e", replace(RANK, layers=(1,)))
    with open_package(tmp_path / "e", base=None, trusted_keys=None, into=tmp_path / "copy") as package:
        added = [
            [bool(one.product().any()) for one in package.weights.low_rank_layer(layer).factors] for layer in (0, 1)
        ]
    assert added == [[False] * 3, [True] * 3]


class Killed(Exception):
    """The process is gone."""


def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("whole")
    step, lives = Run._step, [4, 100]

    def mortal(self: Run, batch: loop.Batch, rate: float) -> float:
        lives[0] -= 1
        if lives[0] < 0:
            lives.pop(0)
            raise Killed
        return step(self, batch, rate)

    monkeypatch.setattr(Run, "_step", mortal)
    with pytest.raises(Killed):
        train("cut")
    with pytest.raises(TrainingRefused, match="holds a run with other options"):
        train("cut", replace(OPTIONS, rank=2))
    train("cut")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


@pytest.mark.parametrize("rank", [0, 13, -1])
def test_a_rank_that_no_expert_has_is_refused(rank: int, train: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(SizeInvalid, match=f"rank is {rank}; the projections are 12 x 16, so it must be 1 to 12"):
        train("e", replace(OPTIONS, rank=rank))
    assert list(tmp_path.iterdir()) == []


def test_a_rank_on_several_processes_is_refused(
    train: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_anchor(folder / "anchor")
    monkeypatch.setattr("flexgate.experts.training.train_expert.load_anchor", lambda *_: whole)
    world = World()
    world.mesh = object()  # type: ignore[assignment]
    with pytest.raises(TrainingRefused, match="a rank is trained in one process: start the command without torchrun"):
        train("e", world=world)


def test_factors_are_made_by_the_seed_alone(folder: Path) -> None:
    def starts(seed: int) -> list[torch.Tensor]:
        anchor = load_anchor(folder / "anchor")
        pair = make_pair(anchor, [Row(row.clone()) for row in public_rows(anchor)])
        use_factors(pair, 3, seed)
        ffns = [block.mlp.ffns[1] for block in pair.model.blocks]
        return [one.a_RI for ffn in ffns if isinstance(ffn, LowRankFFN) for one in ffn.factors(torch.float32)]

    assert all(torch.equal(one, other) for one, other in zip(starts(1), starts(1), strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(starts(1), starts(2), strict=True))
