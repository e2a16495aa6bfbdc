"""Training on several processes: the steps of one, shared out; and what happens when one of them fails."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packagekit import statement, write_model
from safetensors.torch import load_file
from torch import Tensor
from trainkit import torchrun, write_owner
from typer.testing import CliRunner

from flexgate.experts.checkpoint.layout import Architecture
from flexgate.experts.cli.main import app
from flexgate.experts.errors import TrainingRefused
from flexgate.experts.training.batches import Batch, Example, make_batch, part_of
from flexgate.experts.training.loop import Plan, Run
from flexgate.experts.training.model import FlexOlmo
from flexgate.experts.training.objective import initialise, language_loss, weighted_loss
from flexgate.experts.training.pair import Row, make_pair, z_loss
from flexgate.experts.training.parallel import require_one_kind, take
from flexgate.experts.training.train_expert import (
    ExpertOptions,
    RouterOptions,
    Texts,
    load_anchor,
    require_rows,
    train_expert,
)

PLAN = Plan(steps=24, peak=5e-3, tokens_per_batch=100, save_every=6, evaluate_every=6)
OPTIONS = ExpertOptions(PLAN, RouterOptions("mean-hidden", train=True), length=48)
WORDS = [
    *("--length", "48", "--router", "mean-hidden", "--train-router", "--steps", "24", "--peak", "5e-3"),
    *("--tokens-per-batch", "100", "--save-every", "6", "--evaluate-every", "6"),
]
OBSERVED = Path(__file__).parents[2] / "support/observed_training.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Public and own texts, an anchor, a statement."""
    root = tmp_path_factory.mktemp("parallel")
    write_owner(root)
    (root / "s.json").write_text(statement("zorp").model_dump_json())
    return root


def observed(folder: Path, name: str, death: str = "none:0", how: str = "kill") -> tuple[int, str, str]:
    """Train ``name`` in two processes that report; exit status, output, errors."""
    texts = [folder / "anchor", folder / "own", folder / name, "--public", folder / "public"]
    words = ["train", *texts, "--statement", folder / "s.json", *WORDS]
    done = torchrun(sys.executable, OBSERVED, folder / name, death, how, *words)
    return done.returncode, done.stdout, done.stderr


class One:
    """The training in one process, in this one."""

    def __init__(self, folder: Path, name: str) -> None:
        self.losses: list[float] = []
        self.rows: list[list[list[int]]] = []
        step = Run._step

        def recorded(run: Run, batch: Batch, rate: float) -> float:
            self.losses.append(step(run, batch, rate))
            self.rows.append(batch.tokens_BT.tolist())
            return self.losses[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "_step", recorded)
            _, self.outcome = train_expert(
                folder / "anchor", folder / "own", folder / "public", folder / name, statement("zorp"), OPTIONS
            )


@pytest.fixture(scope="module")
def one(folder: Path) -> One:
    """The package ``one``, made by one process."""
    return One(folder, "one")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    """The package ``two``, made by two processes, and what each of them reports."""
    status, out, err = observed(folder, "two")
    assert status == 0, err
    assert out.count("held_out_loss") == 1
    return [json.loads((folder / f"two.{rank}.json").read_text()) for rank in range(2)]


def weights(package: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(package / "expert.safetensors")
    return tensors


def assert_close(package: Path, other: Path) -> None:
    """Equal but for the order of additions: measured 1e-7, where the training moved weights by 0.01 and more."""
    mine, theirs = weights(package), weights(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(folder: Path, one: One, two: list[dict[str, Any]]) -> None:
    assert len(one.losses) == 24
    for report in two:
        assert report["losses"] == pytest.approx(one.losses, rel=1e-5)
    assert_close(folder / "two", folder / "one")
    manifests = [json.loads((folder / name / "manifest.json").read_text()) for name in ("one", "two")]
    assert manifests[0]["training"] == manifests[1]["training"]
    assert manifests[0]["base"] == manifests[1]["base"]
    values = [manifest["evaluation"][-1]["value"] for manifest in manifests]
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert sorted(path.name for path in (folder / "two").iterdir()) == ["expert.safetensors", "manifest.json"]
    assert not (folder / ".two.training").exists()


@pytest.mark.slow
def test_every_row_of_a_batch_is_computed_by_one_process(one: One, two: list[dict[str, Any]]) -> None:
    alone = 0
    for whole, *parts in zip(one.rows, *(report["rows"] for report in two), strict=True):
        assert Counter(map(tuple, whole)) == Counter(tuple(row) for part in parts for row in part)
        assert len(parts[0]) - len(parts[1]) in (0, 1)
        alone += not parts[1]
    assert alone, "no batch had fewer rows than processes"


@pytest.mark.slow
def test_parameters_and_moments_are_sharded_and_frozen_ones_have_no_gradient(two: list[dict[str, Any]]) -> None:
    for report in two:
        assert report["held"] == pytest.approx(report["numbers"] / 2, rel=0.01)
        assert report["moments_held"] == pytest.approx(report["moments"] / 2, rel=0.01)
        assert {name.split(".", 3)[3] for name in report["gradients"]} == {
            "mlp.experts.1.down_proj.weight",
            "mlp.experts.1.gate_proj.weight",
            "mlp.experts.1.up_proj.weight",
            "mlp.gate.raw_bias",
            "mlp.gate.row_H",
        }


@pytest.mark.slow
def test_a_training_killed_everywhere_goes_on_from_its_last_state_in_two_processes_or_one(
    folder: Path, two: list[dict[str, Any]]
) -> None:
    status, _, _ = observed(folder, "cut", death="all:15")
    assert status != 0
    assert not (folder / "cut").exists()
    shutil.copytree(folder / ".cut.training", folder / ".rest.training")
    status, _, err = observed(folder, "cut")
    assert status == 0, err
    assert len(json.loads((folder / "cut.0.json").read_text())["losses"]) == 24 - 12
    for name in ("manifest.json", "expert.safetensors"):
        assert (folder / "cut" / name).read_bytes() == (folder / "two" / name).read_bytes()
    assert len(One(folder, "rest").losses) == 24 - 12
    assert_close(folder / "rest", folder / "two")


@pytest.mark.slow
@pytest.mark.sliced(1)
@pytest.mark.parametrize(("how", "told"), [("kill", "Signal 9 (SIGKILL)"), ("error", "ValueError: unforeseen")])
def test_a_process_that_dies_ends_the_others_and_nothing_is_written(how: str, told: str, folder: Path) -> None:
    status, out, err = observed(folder, f"orphan-{how}", "1:15", how)
    assert status != 0
    assert out == ""
    assert told in err
    assert {path.name for path in folder.glob(f"*orphan-{how}*")} == {f".orphan-{how}.training"}
    assert [path.name for path in (folder / f".orphan-{how}.training").iterdir()] == ["state.pt"]


@pytest.mark.slow
@pytest.mark.sliced(1)
@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (("bad", "bad"), "own/a.txt is not UTF-8 text: byte 3 is 0xe9"),
        (("good", "bad"), "own/a.txt is not UTF-8 text: byte 3 is 0xe9"),
        (("good", "other"), "process 1 sees another training than process 0: anchor, texts, options and saved state"),
    ],
    ids=["all-see-bad-texts", "only-one-sees-bad-texts", "one-sees-other-texts"],
)
def test_what_any_process_refuses_ends_all_with_one_message(
    seen: tuple[str, str], message: str, folder: Path, tmp_path: Path
) -> None:
    """The folder ``own`` is another one for either process."""
    texts = {"good": b"zorp quil " * 99, "other": b"zorp quil " * 100, "bad": b"caf\xe9 " * 99}
    for rank, name in enumerate(seen):
        (tmp_path / str(rank) / "own").mkdir(parents=True)
        for number in range(4):
            (tmp_path / str(rank) / f"own/{'abcd'[number]}.txt").write_bytes(texts[name])
    start = ["experts", "train", folder / "anchor", "own", tmp_path / "never", "--public", folder / "public"]
    command = shlex.join(map(str, ["flexgate", *start, "--statement", folder / "s.json", *WORDS]))
    done = torchrun("bash", "-c", f"cd {shlex.quote(str(tmp_path))}/$RANK && exec {command}")
    assert done.returncode == 1
    errors = re.findall(r"^error: (.*)", done.stderr, re.MULTILINE)
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith(message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


ARCHITECTURE = Architecture(31, 16, 12, 2, 2, 2, num_experts=1, num_experts_per_tok=1)
EXAMPLES = [Example(tuple(range(2, 4 + size)), 2) for size in (5, 6, 3)]


def test_an_anchor_with_a_tied_head_is_not_shared_out(tmp_path: Path) -> None:
    write_model(tmp_path / "anchor", replace(ARCHITECTURE, tie_word_embeddings=True))
    mesh: Any = object()
    with pytest.raises(TrainingRefused, match="has tied embeddings: train against it in one process"):
        load_anchor(tmp_path / "anchor", mesh)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_losses_of_the_parts_add_up_to_the_loss_of_the_batch(count: int) -> None:
    anchor = FlexOlmo(ARCHITECTURE)
    initialise(anchor, 1)
    pair = make_pair(anchor, [Row(torch.linspace(-1, 1, 16), -0.5)] * 2)
    batch = make_batch(EXAMPLES, pad_id=1, prompt_weight=0.3)

    def losses(batch: Batch) -> Tensor:
        with torch.no_grad():
            hidden = pair.hidden(batch.tokens_BT)
            dense, sparse = language_loss(pair.lm_head(hidden), batch), weighted_loss(pair, hidden, batch)
            return torch.stack((dense, sparse, z_loss(pair, batch)))

    parts = torch.stack([losses(part_of(batch, number, count)) for number in range(count)])
    torch.testing.assert_close(parts.sum(0), losses(batch))
    assert (parts.abs().sum(-1) > 0).sum() == min(count, len(EXAMPLES))


def test_a_batch_without_a_row_for_every_process_is_refused() -> None:
    texts = Texts([Example((1,) * 40, 0)], [], [Example((1,) * 48, 0)], pad_id=0, documents=1)
    require_rows(Plan(tokens_per_batch=96), texts, 2)
    require_rows(Plan(tokens_per_batch=1), texts, 1)
    with pytest.raises(TrainingRefused, match="95 tokens has no piece of 48 for each of 2 processes: take 96"):
        require_rows(Plan(tokens_per_batch=95), texts, 2)


def test_processes_without_a_gpu_each_are_refused() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(TrainingRefused, match=f"{count + 1} processes on a machine with {count} GPUs: start one"):
        take(torch.device("cuda", count), count + 1)
    require_one_kind(["cpu", "cpu"])
    with pytest.raises(TrainingRefused, match="process 1 has a GPU, process 0 none: start all on GPUs, or all on CPUs"):
        require_one_kind(["cpu", "cuda", "cpu"])


@pytest.mark.parametrize("command", ["train-anchor", "tune-router"])
def test_commands_for_one_process_are_refused_under_torchrun(command: str, tmp_path: Path) -> None:
    names = ["texts", "target"] if command == "train-anchor" else ["model", "texts", "target"]
    words = [command, *(str(tmp_path / name) for name in names)]
    result = CliRunner().invoke(app, words, env={"TORCHELASTIC_RUN_ID": "1"})
    assert result.exit_code == 1
    assert result.stderr.startswith("error: this command trains in one process: start it without torchrun")
