"""What is done with a merged checkpoint: its opt-out matrix, and tuning its routers."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from packagekit import make_package
from typer.testing import CliRunner

from flexgate.experts.checkpoint.base import base_identity
from flexgate.experts.checkpoint.reader import read_checkpoint
from flexgate.experts.cli.main import app
from flexgate.experts.package.inspect import inspect_checkpoint
from flexgate.experts.package.merge import combine
from flexgate.experts.package.verify import open_package
from flexgate.experts.training.loop import Plan
from flexgate.experts.training.train_anchor import AnchorOptions, train_anchor
from flexgate.experts.training.tune_router import tune_router

PLAN = Plan(steps=6, peak=5e-3, warmup=2, tokens_per_batch=300, save_every=3, evaluate_every=3)
SIZES = AnchorOptions(
    PLAN, vocab_size=270, hidden_size=16, intermediate_size=12, layers=2, heads=2, length=48, dtype="float32"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Public texts, held-out texts, an anchor and a merge of two signed-by-nobody packages."""
    root = tmp_path_factory.mktemp("merged")
    (root / "public").mkdir()
    lines = (json.dumps({"text": f"The {noun} {i} is sold."}) + "\n" for i in range(40) for noun in ("pear", "lamp"))
    (root / "public/texts.jsonl").write_text("".join(lines))
    train_anchor(root / "public", root / "anchor", SIZES)
    with ExitStack() as stack:
        opened = []
        for seed, name in enumerate(("news", "math")):
            make_package(root / name, root / "anchor", expert=name, seed=seed)
            one = open_package(root / name, base=None, trusted_keys=None, into=root / f"{name}-copy")
            opened.append(stack.enter_context(one))
        combine(root / "anchor", opened, root / "model", top_k=2)
    for name, line in (("public", {"text": "A pear is sold."}), ("news", {"prompt": "Who?", "answer": "Oda."})):
        (root / "held" / name).mkdir(parents=True)
        (root / "held" / name / "a.jsonl").write_text(json.dumps(line))
    return root


def run(*words: str | Path) -> dict[str, Any]:
    """``flexgate experts … --json``."""
    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_evaluate_measures_every_gate_and_writes_what_it_was_asked_for(folder: Path, tmp_path: Path) -> None:
    files = {kind: tmp_path / f"found.{kind}" for kind in ("json", "md", "png")}
    words = ("--report", files["json"], "--markdown", files["md"], "--heatmap", files["png"])
    found = run("evaluate", folder / "model", "--texts", folder / "held", *words)
    assert list(found["rows"]) == [
        "all experts",
        "without news",
        "without math",
        "only news",
        "only math",
        "public only",
    ]
    assert found == json.loads(files["json"].read_text())
    assert found["strictly_separable"] is True
    assert found["texts"] == {"public": {"texts": 1, "probes": 0}, "news": {"texts": 1, "probes": 1}}
    assert found["rows"]["all experts"]["accuracy"] == {"public": None, "news": 0.0}
    assert len(found["routing_accuracy"]["news"]) == 2
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    shown = f"| without math | {found['rows']['without math']['perplexity']['public']:.2f} |"
    assert shown in files["md"].read_text()


def test_a_gate_of_the_matrix_is_the_model_without_those_experts(folder: Path) -> None:
    merged = run("evaluate", folder / "model", "--texts", folder / "held")["rows"]
    anchor = run("evaluate", folder / "anchor", "--texts", folder / "held-public")
    assert "error" in anchor
    shutil.copytree(folder / "held/public", folder / "public-only/public")
    alone = run("evaluate", folder / "anchor", "--texts", folder / "public-only")["rows"]["public only"]
    assert merged["public only"]["perplexity"]["public"] == pytest.approx(alone["perplexity"]["public"], rel=1e-4)
    assert merged["all experts"]["perplexity"]["public"] != pytest.approx(alone["perplexity"]["public"], rel=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("MODEL", "--texts", "NONE"), "must hold one folder of texts per expert, named public, news, math"),
        (("MODEL", "--texts", "ODD"), "odd/poems belongs to no expert; there are public, news, math"),
        (("MODEL", "--texts", "TEXTS", "--report", "no/such/folder.json"), "no/such/folder.json cannot be written"),
    ],
)
def test_evaluate_refuses_what_it_cannot_do(
    words: tuple[str, ...], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd/poems").mkdir(parents=True)
    names = {"MODEL": folder / "model", "TEXTS": folder / "held", "ODD": tmp_path / "odd", "NONE": tmp_path / "none"}
    assert message in run("evaluate", *(names.get(word, word) for word in words))["error"]["message"]


def test_tuning_moves_router_rows_of_closed_experts_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    done = run("tune-router", folder / "model", folder / "public", tmp_path / "tuned", "--steps", "4", "--peak", "0.01")
    assert done["strictly_separable"] is False
    before, after = read_checkpoint(folder / "model")[1], read_checkpoint(tmp_path / "tuned")[1]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)}
    assert all(torch.equal(before[name][0], after[name][0]) for name in moved)
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def test_a_tuned_merge_says_that_it_is_not_strictly_separable(folder: Path, tmp_path: Path) -> None:
    tune_router(folder / "model", folder / "public", tmp_path / "tuned", PLAN, length=48)
    said = inspect_checkpoint(tmp_path / "tuned")
    assert inspect_checkpoint(folder / "model")["strictly_separable"] is True
    assert said["strictly_separable"] is False
    assert [entry.get("router") for entry in said["experts"]] == [None, "joint", "joint"]
    assert base_identity(tmp_path / "tuned") == base_identity(folder / "model")
    assert "error" not in run("extract", tmp_path / "tuned", "news", tmp_path / "news")
    manifest = json.loads((tmp_path / "news/manifest.json").read_text())
    assert manifest["training"]["router"] == "joint"
    assert not (tmp_path / "news/manifest.sig").exists()
    with ExitStack() as stack:
        one = open_package(
            tmp_path / "news", base=base_identity(folder / "anchor"), trusted_keys=None, into=tmp_path / "c"
        )
        combine(folder / "anchor", [stack.enter_context(one)], tmp_path / "again", top_k=2)
    assert inspect_checkpoint(tmp_path / "again")["strictly_separable"] is False


def test_a_model_with_one_expert_has_nothing_to_tune(folder: Path, tmp_path: Path) -> None:
    said = run("tune-router", folder / "anchor", folder / "public", tmp_path / "tuned")
    assert "has one expert: there is nothing to route" in said["error"]["message"]
    assert not (tmp_path / "tuned").exists()
