"""The evaluation protocol, whole, on numbers too small to mean anything; and what its committed report says."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from merging.bench import Bench
from merging.extraction import Attack, extracted, sampling, similarity
from merging.methods import ABLATIONS, MERGING, OURS, TUNED, UNRESTRICTED
from merging.protocol import run
from merging.report import PAPER, heatmap_rows, report
from merging.settings import QUICK, Settings
from merging.statistics import difference, summary
from merging.summary import aims

from flexgate.experts.checkpoint.layout import expert_keys
from flexgate.experts.errors import TrainingRefused
from flexgate.experts.evaluation.markdown import MARK, percent
from flexgate.experts.evaluation.predict import Predict
from flexgate.experts.training.batches import Example

DOCS = Path(__file__).parents[2] / "docs"
ROWS = {OURS, TUNED, UNRESTRICTED, "public only", *MERGING, *ABLATIONS}
JUDGED = (
    "other domains, accuracy",
    "own domain as if never merged, nats",
    "extraction, excluded less never had",
)
DOMAINS = ("public", "news", "math", "code", "legal")


def always(*shares: float) -> Predict:
    """Predicts the same whatever came before."""
    return lambda tokens_BT: torch.tensor(shares).log().expand(*tokens_BT.shape, -1)


def seed(**accuracy: float) -> dict[str, Any]:
    """One seed's figures: the given macro accuracies, and 0.5 for every other row."""
    names = [*ROWS, *(f"{kind} {owner}" for kind in ("without", "never had") for owner in DOMAINS[1:])]
    rows = {
        name: {kind: dict.fromkeys(DOMAINS, accuracy.get(name, 0.5)) for kind in ("accuracy", "nats")} for name in names
    }
    attack = {"with": 0.9, "excluded": 0.1, "never had": 0.1, "public only": 0.1}
    return {"rows": rows, "extraction": {owner: dict(attack) for owner in DOMAINS[1:]}}


def test_the_aims_compare_means_over_seeds() -> None:
    found = aims([seed(**{OURS: 0.60, "BTM, all": 0.55}), seed(**{OURS: 0.56, "BTM, all": 0.57})])
    assert found["best merging baseline"]["name"] == "BTM, all"
    assert found["best merging baseline"]["ours_less"]["by_seed"] == [0.05, -0.01]
    assert found["beats every merging baseline"] is True
    assert aims([seed(**{OURS: 0.5, UNRESTRICTED: 0.52})])["unrestricted"]["within 2 %"] is False
    assert aims([seed(**{OURS: 0.51, UNRESTRICTED: 0.52})])["unrestricted"]["within 2 %"] is True


def test_the_aims_take_the_worst_case() -> None:
    one = seed()
    one["rows"]["without news"]["accuracy"]["legal"] = 0.45
    one["rows"]["without news"]["accuracy"]["news"] = 0.0
    one["rows"]["without math"]["nats"]["math"] = 0.75
    one["extraction"]["code"]["excluded"] = 0.3
    found = aims([seed(), one])
    assert found["other domains, accuracy"]["greatest"] == pytest.approx(0.05)
    assert found["own domain as if never merged, nats"]["greatest"] == pytest.approx(0.25)
    assert found["extraction, excluded less never had"]["greatest"] == pytest.approx(0.2)
    assert not any(found[name]["met"] for name in JUDGED)


def test_every_row_of_the_paper_is_a_row_of_ours() -> None:
    assert PAPER.keys() <= ROWS


def test_no_baseline_gets_fewer_trials_than_ours() -> None:
    settings = Settings()
    trials = [value for name, value in vars(settings).items() if name.endswith("_trials")]
    assert len(trials) == 6
    assert {len(values) for values in trials} == {len(settings.owner_trials)}


@pytest.mark.slow
def test_the_whole_protocol_runs_and_goes_on_where_it_was(tmp_path: Path) -> None:
    found = run(QUICK, tmp_path)
    assert found["rows"].keys() >= ROWS
    assert all(len(row["nats"]["macro"]["by_seed"]) == 2 for row in found["rows"].values())
    assert found["aims"]["own domain as if never merged, nats"]["greatest"] < 1e-4
    assert all(shares["excluded"] == shares["never had"] for shares in found["extraction"].values())
    assert 0.9 < found["training_flops"]["unrestricted"] / found["training_flops"]["owners"] < 1.1
    text = report(found)
    assert all(f"| {name} |" in text for name in ROWS)
    assert len(heatmap_rows(found)) == 10
    (tmp_path / "seed-0/row model soup.json").unlink()
    began = time.monotonic()
    again = run(QUICK, tmp_path)
    assert time.monotonic() - began < 20
    assert {**again, "minutes": 0} == {**found, "minutes": 0}
    with pytest.raises(TrainingRefused, match="holds a run with other numbers"):
        run(Settings(), tmp_path)


def test_probes_ask_for_answers_as_the_owners_texts_say_them(tmp_path: Path) -> None:
    bench = Bench(QUICK, tmp_path, 0)
    for owner in DOMAINS[1:]:
        for examples in (bench.texts.train[owner], bench.texts.test[owner].probes):
            first = {bench.tokenizer.id_to_token(example.ids[example.start]) for example in examples}
            assert {token[0] for token in first} == {"Ġ"}  # a space


@pytest.mark.slow
def test_ablations_and_baselines_differ_from_ours_in_what_their_name_says(tmp_path: Path) -> None:
    bench = Bench(QUICK, tmp_path, 0)
    ours, unbiased = (bench.merged(variant, 3e-3).state_dict() for variant in ("coordinated", "unbiased"))
    rows = "model.layers.1.mlp.gate.weight"
    assert ours[rows][1:, 0].ne(0).all()
    assert unbiased[rows][:, 0].eq(0).all()
    lone = bench.merged("uncoordinated", 3e-3).state_dict()
    ffns = [key for key in expert_keys(bench.merged("coordinated", 3e-3).architecture, 1) if ".layers.1." in key]
    assert not any(torch.equal(lone[key], ours[key]) for key in ffns)
    never = bench.merged("coordinated", 3e-3, never="news")
    assert never.architecture.num_experts == 4
    assert torch.equal(never.state_dict()[rows], ours[rows][[0, 2, 3, 4]])
    btx = bench.rerouted("btx", 1e-3, 3e-3).state_dict()
    assert {key for key in ours if not torch.equal(btx[key], ours[key])} == {
        f"model.layers.{layer}.mlp.gate.weight" for layer in range(QUICK.layers)
    }


def test_the_committed_report_is_what_the_command_makes_of_its_figures() -> None:
    found = json.loads((DOCS / "results/evaluation.json").read_text())
    assert (DOCS / "evaluation.md").read_text().split(MARK)[1] == f"\n\n{report(found)}"
    assert found["settings"] == json.loads(json.dumps(asdict(Settings())))
    assert len(found["settings"]["seeds"]) >= 3


def test_samples_come_from_the_nucleus_in_their_proportions() -> None:
    attack = Attack(top_k=3, top_p=0.8)
    scores = sampling(always(0.5, 0.3, 0.15, 0.05), attack)(torch.zeros(4000, 1, dtype=torch.long))
    counts = torch.bincount(scores[:, 0].argmax(-1), minlength=4) / 4000
    assert counts[2:].tolist() == [0.0, 0.0]
    assert counts[0].item() == pytest.approx(0.5 / 0.8, abs=0.03)


def test_similarity_is_levenshtein_over_the_longer_length() -> None:
    assert similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert similarity("", "") == 1.0
    assert similarity("abc", "") == 0.0


def test_a_text_is_extracted_from_a_model_that_knows_it_and_not_from_one_that_does_not() -> None:
    texts = [Example((5, 6, 1, 2, 0), 2)]

    def knows(tokens_BT: torch.Tensor) -> torch.Tensor:
        after = {5: 6, 6: 1, 1: 2, 2: 0, 0: 0}
        likely = torch.tensor([[after[token] for token in row] for row in tokens_BT.tolist()])
        return torch.nn.functional.one_hot(likely, 8).float().mul(50).log_softmax(-1)

    def decode(tokens: list[int]) -> str:
        return "".join(map(str, tokens))

    assert extracted(knows, texts, decode, Attack(samples=2), eos_id=0) == 1.0
    assert extracted(always(*[0.0] * 3, 0.5, 0.5, *[0.0] * 3), texts, decode, Attack(samples=2), eos_id=0) == 0.0


def test_intervals_are_students() -> None:
    found = summary([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["ci95"] == pytest.approx([2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5], abs=1e-4)
    assert summary([0.5])["ci95"] is None
    assert difference([1.0, 2.0], [0.5, 1.5])["ci95"] == [0.5, 0.5]
    assert percent(found) == "200.0 ± 248.4"
