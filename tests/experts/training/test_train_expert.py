"""Training from a folder of texts: what moves, what stays, what a killed run loses, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from packagekit import statement
from trainkit import OPTIONS, PLAN, write_owner

from flexgate.experts.checkpoint.base import base_identity
from flexgate.experts.checkpoint.reader import read_checkpoint
from flexgate.experts.errors import TextsInvalid, TrainingRefused
from flexgate.experts.package.verify import open_package
from flexgate.experts.training import loop
from flexgate.experts.training.batches import Example
from flexgate.experts.training.loop import Plan, Run
from flexgate.experts.training.pair import PairRouter, Row, make_pair, rows_from_discriminant, trainable
from flexgate.experts.training.routing import Samples
from flexgate.experts.training.train_expert import ExpertOptions, RouterOptions, load_anchor, train_expert


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Public and own texts, and an anchor."""
    root = tmp_path_factory.mktemp("training")
    write_owner(root)
    return root


def test_a_trained_package_fits_its_anchor_and_only_the_ffn_moved(folder: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in (folder / "anchor").iterdir()}
    manifest, outcome = train_expert(
        folder / "anchor", folder / "own", folder / "public", tmp_path / "e", statement("zorp"), OPTIONS
    )
    assert outcome.steps == 8
    assert (manifest.training.documents, manifest.training.tokens) == (31, outcome.tokens)
    assert manifest.training.recipe["router_start"] == "discriminant"
    assert manifest.evaluation[-1].value == outcome.held_out_loss
    base = base_identity(folder / "anchor")
    with open_package(tmp_path / "e", base=base, trusted_keys=None, into=tmp_path / "copy") as package:
        _, anchor = read_checkpoint(folder / "anchor")
        for number in range(2):
            public = anchor[f"model.layers.{number}.mlp.experts.0.up_proj.weight"]
            assert not torch.equal(package.layer(number).up_proj_FH, public)
    assert {path.name: path.read_bytes() for path in (folder / "anchor").iterdir()} == before
    assert not (tmp_path / ".e.training").exists()


def test_layers_that_are_not_trained_stay_public_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, layers=(1,))
    train_expert(folder / "anchor", folder / "own", folder / "public", tmp_path / "e", statement("zorp"), options)
    _, anchor = read_checkpoint(folder / "anchor")
    with open_package(tmp_path / "e", base=None, trusted_keys=None, into=tmp_path / "copy") as package:
        same = [
            torch.equal(package.layer(n).down_proj_HF, anchor[f"model.layers.{n}.mlp.experts.0.down_proj.weight"])
            for n in (0, 1)
        ]
    assert same == [True, False]


def test_only_the_owners_parameters_are_in_the_graph_and_the_optimizer(folder: Path) -> None:
    anchor = load_anchor(folder / "anchor")
    rows = rows_from_discriminant(*_samples(), [torch.zeros(16)] * 2, decay=1e-3, sharpness=1.0)
    pair = make_pair(anchor, rows)
    named = trainable(pair, [1], train_router=True)
    assert sorted(named) == [
        "1.ffn.down_proj.weight",
        "1.ffn.gate_proj.weight",
        "1.ffn.up_proj.weight",
        "1.router.raw_bias",
        "1.router.row_H",
    ]
    pair(torch.arange(12).view(1, 12)).square().mean().backward()
    with_gradient = {id(p) for p in pair.parameters() if p.grad is not None}
    assert with_gradient == {id(p) for p in named.values()}


def _samples() -> tuple[Samples, Samples]:
    generator = torch.Generator().manual_seed(0)
    own = tuple(torch.randn(60, 16, generator=generator) + 1.0 for _ in range(2))
    other = tuple(torch.randn(90, 16, generator=generator) - 1.0 for _ in range(2))
    return Samples(own, torch.ones(60)), Samples(other, torch.ones(90))


def test_a_discriminant_routes_own_text_to_the_owner_with_a_bias_of_at_most_zero() -> None:
    own, other = _samples()
    public = torch.randn(16, generator=torch.Generator().manual_seed(1))
    for shift in (0.0, 2.0):
        moved = [Samples(tuple(x + shift for x in s.inputs_LNH), s.weights_N) for s in (own, other)]
        for layer, row in enumerate(rows_from_discriminant(*moved, [public] * 2, decay=1e-3, sharpness=4.0)):
            assert row.bias <= 0
            router = PairRouter(public, row)
            shares = [router(s.inputs_LNH[layer], None)[:, 1].mean().item() for s in moved]
            assert shares[0] > 0.8
            assert shares[1] < 0.2


def test_an_intercept_that_would_be_positive_is_fixed_at_zero() -> None:
    moved = [Samples(tuple(x - 2.0 for x in s.inputs_LNH), s.weights_N) for s in _samples()]
    rows = rows_from_discriminant(*moved, [torch.zeros(16)] * 2, decay=1e-3, sharpness=1.0)
    assert [row.bias for row in rows] == [0.0, 0.0]
    assert all(bool(row.weight_H.any()) for row in rows)


def test_a_positive_bias_acts_as_zero() -> None:
    router = PairRouter(torch.zeros(4), Row(torch.zeros(4), 3.0))
    assert router(torch.ones(1, 4), None).tolist() == [[0.5, 0.5]]
    router = PairRouter(torch.zeros(4), Row(torch.zeros(4), -3.0))
    assert router(torch.ones(1, 4), None)[0, 1].item() == pytest.approx(0.0474, abs=1e-4)


@pytest.mark.parametrize("start", ["mean-hidden", "embedding"])
def test_other_router_starts_train_with_the_expert_in_bf16(start: str, folder: Path, tmp_path: Path) -> None:
    numpy.save(tmp_path / "embedding.npy", numpy.random.default_rng(0).normal(size=(5, 16)))
    router = RouterOptions("mean-hidden", train=True)
    if start == "embedding":
        router = RouterOptions("embedding", tmp_path / "embedding.npy", train=True)
    plan = replace(PLAN, arithmetic="bfloat16")
    options = ExpertOptions(plan, router, length=48, public_share=0.0)
    manifest, outcome = train_expert(
        folder / "anchor", folder / "own", None, tmp_path / "e", statement("zorp"), options
    )
    assert outcome.held_out_loss < 10
    assert manifest.training.recipe["router_trained"] == "with the expert"
    open_package(tmp_path / "e", base=None, trusted_keys=None, into=tmp_path / "copy").close()


class Killed(Exception):
    """The process is gone."""


def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def go(name: str) -> None:
        train_expert(folder / "anchor", folder / "own", folder / "public", tmp_path / name, statement("zorp"), OPTIONS)

    go("whole")
    step, lives = Run._step, [2, 3, 4, 100]

    def mortal(self: Run, batch: loop.Batch, rate: float) -> float:
        lives[0] -= 1
        if lives[0] < 0:
            lives.pop(0)
            raise Killed
        return step(self, batch, rate)

    monkeypatch.setattr(Run, "_step", mortal)
    for _ in range(3):
        with pytest.raises(Killed):
            go("cut")
        assert not (tmp_path / "cut").exists()
    go("cut")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_a_begun_run_with_other_options_is_not_gone_on_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def go(options: ExpertOptions) -> None:
        train_expert(folder / "anchor", folder / "own", folder / "public", tmp_path / "e", statement("zorp"), options)

    with monkeypatch.context() as patch:
        patch.setattr("flexgate.experts.training.train_expert.write_package", _raise_killed)
        with pytest.raises(Killed):
            go(OPTIONS)
    with pytest.raises(TrainingRefused, match="holds a run with other options or texts"):
        go(replace(OPTIONS, public_share=0.5))


def _raise_killed(*_: object, **__: object) -> None:
    raise Killed


def test_early_stop_keeps_the_best_tensors(tmp_path: Path) -> None:
    value = torch.nn.Parameter(torch.tensor(1.0))

    def loss_of(batch: loop.Batch) -> torch.Tensor:
        """Training pulls up what held-out text (id 9) wants down."""
        return (value - (0.0 if batch.tokens_BT[0, 0] == 9 else 5.0)).square()

    plan = Plan(steps=100, peak=0.1, warmup=1, evaluate_every=2, patience=3, save_every=1)
    run = Run({"value": value}, loss_of, plan, tmp_path, name="toy", pad_id=0)
    outcome = run.run([Example((1, 2), 0)] * 5, [Example((9, 2), 0)], "toy")
    assert outcome.steps == 8
    assert value.item() == pytest.approx(outcome.held_out_loss**0.5)
    assert value.item() < 1.25


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    value = torch.nn.Parameter(torch.tensor(1.0))
    run = Run({"value": value}, lambda _: value * float("nan"), PLAN, tmp_path, name="toy", pad_id=0)
    with pytest.raises(TrainingRefused, match="toy: the loss is nan at step 0: lower the peak rate"):
        run.run([Example((1, 2), 0)], [Example((1, 2), 0)], "toy")


def write(path: Path, text: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
    return path.parent


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", b"", r"holds no text in \*.txt, \*.md, \*.jsonl"),
        ("a.csv", b"hello", r"holds no text"),
        ("a.txt", b"one two three", r"holds \d+ tokens in 1 pieces; at least 500 tokens in 4 pieces are needed"),
        ("a.txt", b"caf\xe9 " * 99, r"a.txt is not UTF-8 text: byte 3 is 0xe9"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": 3}', r'a.jsonl, line 3 must be \{"text": "…"\} or'),
        ("a.jsonl", b"{", r"a.jsonl, line 1 is not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a.jsonl, line 1 is not JSON"),
    ],
)
def test_texts_that_nothing_can_be_learnt_from_are_refused_with_their_place(
    name: str, text: bytes, message: str, folder: Path, tmp_path: Path
) -> None:
    own = write(tmp_path / "own" / name, text)
    with pytest.raises(TextsInvalid, match=message):
        train_expert(folder / "anchor", own, folder / "public", tmp_path / "e", statement("zorp"), OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (replace(OPTIONS, layers=(7,)), r"layers are \(7,\), the model has 0 to 1"),
        (replace(OPTIONS, public_share=1.0), r"public share is 1.0, expected at least 0 and below 1"),
        (replace(OPTIONS, router=RouterOptions("embedding")), "an embedding file goes with the start 'embedding'"),
        (replace(OPTIONS, length=1), "length is 1, expected at least 2"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: ExpertOptions, message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingRefused, match=message):
        train_expert(folder / "anchor", folder / "own", folder / "public", tmp_path / "e", statement("zorp"), options)


def test_a_discriminant_needs_public_text_and_embeddings_their_size(folder: Path, tmp_path: Path) -> None:
    def go(options: ExpertOptions) -> None:
        train_expert(folder / "anchor", folder / "own", None, tmp_path / "e", statement("zorp"), options)

    with pytest.raises(TrainingRefused, match="give public texts, or start from 'mean-hidden'"):
        go(OPTIONS)
    numpy.save(tmp_path / "wrong.npy", numpy.ones(5))
    with pytest.raises(TrainingRefused, match=r"wrong.npy has shape \[5\]; embeddings must be .* size 16"):
        go(replace(OPTIONS, router=RouterOptions("embedding", tmp_path / "wrong.npy")))
    write(tmp_path / "pickled.npy", b"\x93NUMPY nonsense")
    with pytest.raises(TrainingRefused, match="is not a NumPy file of numbers"):
        go(replace(OPTIONS, router=RouterOptions("embedding", tmp_path / "pickled.npy")))


def test_another_models_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    anchor = Path(shutil.copytree(folder / "anchor", tmp_path / "anchor"))
    config = json.loads((anchor / "config.json").read_text())
    (anchor / "config.json").write_text(json.dumps({**config, "eos_token_id": 5}))
    with pytest.raises(TextsInvalid, match="ends texts with 5, the tokenizer with 0"):
        train_expert(anchor, folder / "own", folder / "public", tmp_path / "e", statement("zorp"), OPTIONS)
    (anchor / "config.json").write_text(json.dumps(config))
    (anchor / "tokenizer.json").unlink()
    with pytest.raises(TextsInvalid, match="has no tokenizer that can be loaded"):
        train_expert(anchor, folder / "own", folder / "public", tmp_path / "e", statement("zorp"), OPTIONS)


@pytest.mark.slow
def test_a_run_killed_with_signal_9_goes_on_and_ends_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(statement("zorp").model_dump_json())

    def command(name: str) -> list[str]:
        words = f"train {folder}/anchor {folder}/own {tmp_path}/{name} --public {folder}/public --steps 150"
        options = f"--statement {tmp_path}/s.json --length 48 --tokens-per-batch 300 --save-every 5 --patience 0"
        program = "from flexgate.experts.cli.main import app; app()"
        return [sys.executable, "-c", program, *words.split(), *options.split()]

    subprocess.run(command("whole"), check=True, timeout=300, capture_output=True)
    for after in (1, 2):
        process = subprocess.Popen(command("cut"), stderr=subprocess.PIPE)
        state = tmp_path / ".cut.training/state.pt"
        before = state.stat().st_mtime_ns if state.exists() else 0
        deadline = time.monotonic() + 120
        while (state.stat().st_mtime_ns if state.exists() else 0) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05 * after)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "cut").exists()
    subprocess.run(command("cut"), check=True, timeout=300, capture_output=True)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()
