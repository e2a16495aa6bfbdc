"""A proposed set has the units that a task needs, by examples that none of them was chosen by."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flexgate.experts.checkpoint.layout import Architecture
from flexgate.experts.checkpoint.ownership import Ownership, Unit
from flexgate.experts.cli.main import app
from flexgate.experts.errors import EvaluationRefused, TextsInvalid
from flexgate.experts.evaluation import find_set as finding
from flexgate.experts.evaluation.predict import gated
from flexgate.experts.training.model import FlexOlmo
from flexgate.experts.training.objective import initialise

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "experts" / "demo" / "checkpoint"
FOUR = Architecture(11, 8, 6, 2, 2, 2, num_experts=4, num_experts_per_tok=2)
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
UNITS = (Unit("public", None, ""), Unit("a", "ada", ""), Unit("b", "bob", ""))


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Questions about each of the demo's domains."""
    place, lines = tmp_path_factory.mktemp("examples"), {}
    for line in (DEMO / "probes.jsonl").read_text().splitlines():
        lines.setdefault(json.loads(line)["domain"], []).append(line)
    paths = {domain: place / f"{domain}.jsonl" for domain in lines}
    for domain, path in paths.items():
        path.write_text("\n".join(lines[domain][:16]))
    return paths


@pytest.mark.parametrize("domain", ["news", "math"])
def test_the_demos_own_expert_is_what_a_task_of_its_domain_needs(examples: dict[str, Path], domain: str) -> None:
    outcome = CliRunner().invoke(
        app, ["find-set", str(DEMO), str(examples[domain]), "--most", "1", "--length", "64", "--json"]
    )
    assert outcome.exit_code == 0, outcome.output
    found = json.loads(outcome.output)
    assert found["proposed"] == ["public", domain]
    public, with_it = found["sets"]
    assert public["units"] == ["public"]
    assert with_it["held_out_nats"] < public["held_out_nats"]


def test_what_the_task_does_not_need_is_not_proposed() -> None:
    steps = [finding.Step(("public",), 3.0, 3.0), finding.Step(("public", "a"), 2.0, 2.5)]
    worse = finding.Step(("public", "a", "b"), 1.9, 2.6)
    assert finding.best([*steps, worse]) is steps[1]
    assert finding.best([*steps, finding.Step(("public", "a", "b"), 1.9, 2.5)]) is steps[1]


def test_a_unit_without_finite_weights_hides_no_other() -> None:
    """It comes first, and a comparison with NaN is never true."""
    ownership = Ownership(UNITS, (bytes((0, 1, 2)), bytes((0, 1, 2))))
    measured: list[frozenset[int]] = []

    def losses(present: frozenset[int]) -> tuple[float, float]:
        measured.append(present)
        nats = math.nan if 1 in present else 3.0 - len(present)
        return nats, nats

    steps = finding._forward(ownership, losses, 2)
    assert [step.units for step in steps] == [("public",), ("public", "b"), ("public", "a", "b")]
    assert finding.best(steps) is steps[1]
    assert finding.best(steps[::-1]) is steps[1]
    assert len(measured) == len({*measured}), "a set was measured twice"


def test_the_proposal_is_a_command_that_creates_the_set(examples: dict[str, Path]) -> None:
    outcome = CliRunner().invoke(app, ["find-set", str(DEMO), str(examples["news"]), "--most", "1", "--length", "64"])
    assert outcome.output.splitlines()[-1] == "flexgate sets create set:NAME news"


def test_a_unit_is_gated_in_every_layer_where_its_experts_are() -> None:
    model = FlexOlmo(FOUR)
    initialise(model, 1)
    ownership = Ownership(UNITS, (bytes((0, 1, 1, 2)), bytes((0, 2, 1, 1))))
    with torch.no_grad():
        for block, own in zip(model.model.blocks, ((1, 2), (2, 3)), strict=True):
            torch.nn.init.normal_(block.mlp.gate.weight)
            for number in own:
                block.mlp.ffns[number].up_proj.weight.fill_(float("nan"))
    assert finding.gated_units(model, ownership, frozenset({0, 2}))(TOKENS).isfinite().all()
    assert finding.gated_units(model, ownership, frozenset({0, 1}))(TOKENS).isnan().any()
    identity = Ownership((*UNITS, Unit("c", "cyd", "")), (bytes(range(4)), bytes(range(4))))
    same = gated(model, [True, False, False, True])(TOKENS)
    assert torch.equal(finding.gated_units(model, identity, frozenset({0, 3}))(TOKENS).nan_to_num(), same.nan_to_num())


def test_units_are_added_until_every_layer_has_an_expert_and_required_ones_are_there_from_the_start() -> None:
    units = (UNITS[0], Unit("a", "ada", "", required=True), UNITS[2])
    ownership = Ownership(units, (bytes((0, 2, 1)), bytes((2, 2, 2))))
    measured: list[frozenset[int]] = []

    def losses(present: frozenset[int]) -> tuple[float, float]:
        measured.append(present)
        return 1.0, 1.0

    assert [step.units for step in finding._forward(ownership, losses, 8)] == [("public", "a", "b")]
    assert set(measured) == {frozenset({0, 1, 2})}
    with pytest.raises(EvaluationRefused, match="no set of 0 units has an expert in every layer: allow more"):
        finding._forward(Ownership(UNITS, (bytes((0, 1, 2)), bytes((1, 2, 2)))), losses, 0)


@pytest.mark.parametrize(
    ("name", "content", "why", "error"),
    [
        ("one.jsonl", '{"text": "a"}', "holds one example; two or more are needed", EvaluationRefused),
        ("none.jsonl", "\n", "holds no text", TextsInvalid),
        ("wrong.jsonl", '{"txt": "a"}', r'line 1 must be \{"text"', TextsInvalid),
        ("examples.csv", "a,b", r"must be a file of texts: \*.txt, \*.md, \*.jsonl", TextsInvalid),
    ],
)
def test_examples_that_say_nothing_are_refused(
    tmp_path: Path, name: str, content: str, why: str, error: type[Exception]
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=why):
        finding.find_set(DEMO, tmp_path / name, most=1, length=64, seed=0)
