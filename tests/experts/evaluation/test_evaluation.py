"""Figures and baselines against cases worked out by hand."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexgate.experts.checkpoint.layout import Architecture
from flexgate.experts.errors import EvaluationRefused
from flexgate.experts.evaluation.gates import opt_out_gates
from flexgate.experts.evaluation.heatmap import draw
from flexgate.experts.evaluation.markdown import MARK, write_figures
from flexgate.experts.evaluation.measure import accuracy, choice_accuracy, nats_per_token, routing_accuracy
from flexgate.experts.evaluation.predict import (
    Predict,
    ensemble,
    fit_classifier,
    gated,
    log_posterior,
    routed,
    soup,
)
from flexgate.experts.training.batches import Example
from flexgate.experts.training.model import FlexOlmo
from flexgate.experts.training.objective import initialise

THREE = Architecture(11, 8, 6, 2, 2, 2, num_experts=3, num_experts_per_tok=2)
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture
def model() -> FlexOlmo:
    made = FlexOlmo(THREE)
    initialise(made, 1)
    for block in made.model.blocks:
        torch.nn.init.normal_(block.mlp.gate.weight)
    return made.requires_grad_(False)


def always(*shares: float) -> Predict:
    """Predicts the same whatever came before."""
    return lambda tokens_BT: torch.tensor(shares).log().expand(*tokens_BT.shape, -1)


def test_a_soup_of_identical_experts_is_the_expert(model: FlexOlmo) -> None:
    for block in model.model.blocks:
        for ffn in block.mlp.ffns[1:]:
            ffn.load_state_dict(block.mlp.ffns[0].state_dict())
    mixed = soup(model, [3.0, 1.0, 1.0])
    assert mixed.architecture == replace(THREE, num_experts=1, num_experts_per_tok=1)
    alone = gated(model, [True, False, False])(TOKENS)
    torch.testing.assert_close(gated(mixed, [True])(TOKENS), alone, atol=1e-5, rtol=0)


def test_a_soup_weighs_every_tensor(model: FlexOlmo) -> None:
    one, two, three = (ffn.up_proj.weight for ffn in model.model.blocks[1].mlp.ffns)
    mixed = soup(model, [2.0, 1.0, 1.0]).model.blocks[1].mlp.ffns[0].up_proj.weight
    torch.testing.assert_close(mixed, one / 2 + two / 4 + three / 4)


def test_an_excluded_expert_has_a_weight_of_exactly_zero_and_the_model_never_needs_it(model: FlexOlmo) -> None:
    allowed = [True, True, False]
    x_NH = torch.randn(50, 8)
    for block in model.model.blocks:
        assert block.mlp.gate(x_NH, torch.tensor(allowed).expand(50, -1))[:, 2].eq(0.0).all()
    before = gated(model, allowed)(TOKENS)
    for block in model.model.blocks:
        block.mlp.ffns[2].up_proj.weight.fill_(float("nan"))
    assert torch.equal(gated(model, allowed)(TOKENS), before)


def test_btm_of_one_model_is_that_model(model: FlexOlmo) -> None:
    only = gated(model, [True, True, True])
    torch.testing.assert_close(ensemble([only])(TOKENS), only(TOKENS))


def test_btm_weighs_members_by_how_well_they_predicted_so_far() -> None:
    said = ensemble([always(0.9, 0.1), always(0.3, 0.7)])(torch.tensor([[1, 0, 1]])).exp()[0, :, 0]
    expected = [
        0.5 * 0.9 + 0.5 * 0.3,
        (0.9 * 0.9 + 0.3 * 0.3) / (0.9 + 0.3),
        (0.9 * 0.1 * 0.9 + 0.3 * 0.7 * 0.3) / (0.9 * 0.1 + 0.3 * 0.7),
    ]
    assert said.tolist() == pytest.approx(expected)


def test_btm_confidence_is_a_power_of_the_likelihood() -> None:
    said = ensemble([always(0.9, 0.1), always(0.3, 0.7)], confidence=2.0)(torch.tensor([[0, 0]])).exp()[0, 1, 0]
    assert said.item() == pytest.approx((0.81 * 0.9 + 0.09 * 0.3) / (0.81 + 0.09))


def test_btm_top_2_gives_the_third_member_no_mass_at_all() -> None:
    members = [always(0.9, 0.1), always(0.3, 0.7), always(0.6, 0.4)]
    tokens = torch.tensor([[1, 0, 0]])
    said = torch.stack([member(tokens) for member in members])
    shares_DT = log_posterior(said, tokens, 2)[:, 0].exp()
    assert shares_DT[:, 1].tolist() == pytest.approx([0.9 / 1.5, 0.0, 0.6 / 1.5])
    assert shares_DT[1, 1] == 0.0
    assert shares_DT.sum(0).tolist() == pytest.approx([1.0] * 3)


def test_the_classifier_tells_domains_apart_and_its_choice_answers_alone() -> None:
    domains = [[Example((2, 3, word), 2) for word in range(4)], [Example((4, 5, word), 2) for word in range(4)]]
    classifier = fit_classifier(domains, 8, decay=1e-4)
    tokens = torch.tensor([[2, 3], [5, 4]])
    assert classifier.domain(tokens).tolist() == [[0, 0], [1, 1]]
    said = routed([always(0.9, 0.1), always(0.2, 0.8)], classifier)(tokens).exp()[..., 0]
    assert said.tolist() == [pytest.approx([0.9, 0.9]), pytest.approx([0.2, 0.2])]


def test_a_text_is_placed_by_what_stands_before_its_answer() -> None:
    texts = [Example((1, 0, 2, 2), 2), Example((1, 2, 0, 0), 3)]
    assert choice_accuracy(lambda tokens_BT: tokens_BT, 0, texts) == 1.0
    assert choice_accuracy(lambda tokens_BT: tokens_BT, 2, texts) == 0.0


def test_loss_counts_what_follows_the_prompt_and_nothing_else() -> None:
    examples = [Example((1, 0, 1), 2), Example((0, 0, 0, 0), 0)]
    expected = -(math.log(0.25) + 3 * math.log(0.75)) / 4
    assert nats_per_token(always(0.75, 0.25), examples, 0) == pytest.approx(expected)


def test_an_answer_is_right_if_every_token_is_the_likeliest() -> None:
    probes = [Example((1, 0, 0), 1), Example((1, 0, 1), 1), Example((0, 0), 1)]
    assert accuracy(always(0.75, 0.25), probes) == pytest.approx(2 / 3)
    assert accuracy(always(0.75, 0.25), []) is None


def test_routing_accuracy_is_the_share_of_tokens_that_the_own_expert_leads(model: FlexOlmo) -> None:
    own = [Example((1, 2, 3, 4), 0)]
    for number, block in enumerate(model.model.blocks):
        block.mlp.gate.weight.zero_()
        taps: list[torch.Tensor] = []
        model.hidden(torch.tensor([own[0].ids]), taps=taps)
        block.mlp.gate.weight[2 - number] = 9 * taps[number][0, 0]
    shares = routing_accuracy(model, 2, own, 0)
    assert shares[0] >= 1 / 3
    assert all(share in (0.0, 1 / 3, 2 / 3, 1.0) or share == pytest.approx(round(3 * share) / 3) for share in shares)
    assert routing_accuracy(model, 1, own, 0)[1] >= 1 / 3


def test_every_expert_is_excluded_once_and_alone_once() -> None:
    assert opt_out_gates(["public", "a", "b"]) == {
        "all experts": (True, True, True),
        "without a": (True, False, True),
        "without b": (True, True, False),
        "only a": (True, True, False),
        "only b": (True, False, True),
        "public only": (True, False, False),
    }


def test_what_people_wrote_above_the_figures_stays(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.md"
    write_figures(path, "one\n")
    path.write_text(path.read_text().replace("# Evaluation", "# Read this"))
    write_figures(path, "two\n")
    assert path.read_text() == f"# Read this\n\n{MARK}\n\ntwo\n"


def test_the_heatmap_shows_every_figure(tmp_path: Path) -> None:
    draw({"all experts": {"news": 0.93}, "without news": {"news": 0.0}}, tmp_path / "map.svg", title="answers")
    picture = (tmp_path / "map.svg").read_text()
    assert all(f">{text}<" in picture for text in ("93", "0", "all experts", "without news", "news"))


def test_without_matplotlib_the_heatmap_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EvaluationRefused, match=r"flexgate\[plot\]"):
        draw({"all": {"news": 0.5}}, tmp_path / "map.svg", title="answers")
