"""Routing by scores is what its definition says, and what transformers does where all experts are allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from enginekit.compare import choose_by_scores
from transformers import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

from flexgate.kernels.errors import KernelArgumentError
from flexgate.kernels.gated_scores import gated_scores
from flexgate.kernels.gated_topk import MASS_SCALE, unit_map

TOKENS, EXPERTS, UNITS, TOP_K = 40, 12, 5, 3
UNIT_OF = [0, 1, 2, 3, 4, 1, 2, 3, 4, 0, 1, 2]
GROUPS = [(1, 1), (3, 1), (4, 2), (6, 3), (2, 2)]


def padded(logits_TE: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(logits_TE, (0, -logits_TE.shape[1] % 16))


class Routed:
    """One call, with buffers of its own."""

    def __init__(
        self, logits_TE: torch.Tensor, gates: list[int], correction_E: torch.Tensor, **options: object
    ) -> None:
        tokens, experts = logits_TE.shape
        self.mass_TU = torch.zeros(tokens + 1, UNITS, dtype=torch.int64)
        self.chosen_T = torch.zeros(tokens + 1, dtype=torch.int64)
        settings = {"groups": 1, "open_groups": 1, "renormalize": True, "scale": 1.0, "fill": "first", **options}
        unit_of = settings.pop("unit_of", UNIT_OF[:experts])
        self.weights_TK, self.ids_TK = gated_scores(
            padded(logits_TE),
            torch.tensor(gates),
            unit_E=unit_map(unit_of),
            top_k=TOP_K,
            correction_E=correction_E,
            mass_TU=self.mass_TU,
            chosen_T=self.chosen_T,
            **settings,
        )


@pytest.fixture
def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and corrections."""
    torch.manual_seed(3)
    return torch.randn(TOKENS, EXPERTS), torch.randn(EXPERTS) * 0.3


def gates_of(seed: int) -> list[int]:
    """Some with every unit, each with the common one."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 2**UNITS, (TOKENS,), generator=generator).tolist()
    return [31 if token % 5 == 0 else gate | 1 for token, gate in enumerate(drawn)]


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("groups", "open_groups"), GROUPS)
def test_picks_are_those_of_the_definition(
    drawn: tuple[torch.Tensor, torch.Tensor], groups: int, open_groups: int, renormalize: bool
) -> None:
    logits_TE, correction_E = drawn
    gates = gates_of(groups)
    made = Routed(
        logits_TE, gates, correction_E, groups=groups, open_groups=open_groups, renormalize=renormalize, scale=2.5
    )
    for token, gate in enumerate(gates):
        scores = torch.sigmoid(logits_TE[token])
        kept = [expert for expert, unit in enumerate(UNIT_OF) if gate >> unit & 1]
        picks = choose_by_scores((scores + correction_E).tolist(), kept, groups, open_groups, TOP_K)
        weights = scores[picks] / (scores[picks].sum() if renormalize else 1.0)
        unused = TOP_K - len(picks)
        assert made.ids_TK[token].tolist() == picks + picks[:1] * unused
        torch.testing.assert_close(made.weights_TK[token], torch.cat((weights * 2.5, torch.zeros(unused))))
        mass = torch.zeros(UNITS, dtype=torch.float64)
        for expert, weight in zip(picks, weights, strict=True):
            mass[UNIT_OF[expert]] += weight.double()
        torch.testing.assert_close(made.mass_TU[token] / MASS_SCALE, mass.float())
        assert made.chosen_T[token] == sum({1 << UNIT_OF[expert] for expert in picks})
    assert not made.mass_TU[TOKENS].any()
    assert not made.chosen_T[TOKENS]


@pytest.mark.parametrize(("groups", "open_groups"), GROUPS)
def test_a_full_gate_routes_as_transformers_does(
    drawn: tuple[torch.Tensor, torch.Tensor], groups: int, open_groups: int
) -> None:
    logits_TE, correction_E = drawn
    config = Glm4MoeConfig(
        hidden_size=EXPERTS,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        n_group=groups,
        topk_group=open_groups,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    router = Glm4MoeTopkRouter(config)
    router.weight.data, router.e_score_correction_bias = torch.eye(EXPERTS), correction_E
    _, weights_TK, ids_TK = router(logits_TE)
    made = Routed(logits_TE, [31] * TOKENS, correction_E, groups=groups, open_groups=open_groups, scale=2.5)
    for ids, weights, want_ids, want_weights in zip(made.ids_TK, made.weights_TK, ids_TK, weights_TK, strict=True):
        got = dict(zip(ids.tolist(), weights.tolist(), strict=True))
        want = dict(zip(want_ids.tolist(), want_weights.tolist(), strict=True))
        assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_what_an_excluded_expert_holds_changes_no_bit(
    drawn: tuple[torch.Tensor, torch.Tensor], value: float, groups: int
) -> None:
    logits_TE, correction_E = drawn
    gates = [gate & ~(1 << 2) for gate in gates_of(7)]
    before = Routed(logits_TE, gates, correction_E, groups=groups)
    for expert, unit in enumerate(UNIT_OF):
        if unit == 2:
            logits_TE[:, expert] = correction_E[expert] = value
    after = Routed(logits_TE, gates, correction_E, groups=groups)
    for name in ("weights_TK", "ids_TK", "mass_TU", "chosen_T"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name


def test_excluding_an_expert_equals_removing_it_bit_for_bit(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits_TE, correction_E = drawn
    kept = [expert for expert, unit in enumerate(UNIT_OF) if unit != 2]
    gates = [gate & ~(1 << 2) for gate in gates_of(11)]
    hole = Routed(logits_TE, gates, correction_E)
    units = [UNIT_OF[expert] for expert in kept]
    removed = Routed(logits_TE[:, kept].contiguous(), gates, correction_E[kept], unit_of=units)
    assert torch.equal(hole.weights_TK, removed.weights_TK)
    assert torch.equal(hole.mass_TU, removed.mass_TU)
    assert hole.ids_TK.tolist() == [[kept[id_] for id_ in ids] for ids in removed.ids_TK.tolist()]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set how many threads torch computes with, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("experts", [7, 12, 48, 160])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 8])
def test_a_token_gets_the_same_bits_at_every_place_and_with_any_number_of_threads(
    threads: Callable[[int], None], experts: int, number: int
) -> None:
    """Of torch's sigmoid the last elements of each thread's part differ in bits."""
    torch.manual_seed(5)
    logits_TE, correction_E = torch.randn(999, experts) * 3, torch.randn(experts) * 0.3
    units = [expert % UNITS for expert in range(experts)]
    threads(number)
    made = Routed(logits_TE, [31] * 999, correction_E, unit_of=units)
    threads(1)
    moved = Routed(logits_TE.roll(7, 0), [31] * 999, correction_E, unit_of=units)
    for name in ("weights_TK", "ids_TK"):
        assert torch.equal(getattr(made, name), getattr(moved, name).roll(-7, 0)), name
    assert torch.equal(made.mass_TU[:-1], moved.mass_TU[:-1].roll(-7, 0))
    for token in range(0, 999, 37):
        alone = Routed(logits_TE[token, None], [31], correction_E, unit_of=units)
        assert torch.equal(made.weights_TK[token, None], alone.weights_TK)
        assert torch.equal(made.ids_TK[token, None], alone.ids_TK)


def test_scores_are_sigmoids_rounded_once_more_at_most() -> None:
    logits_TE = torch.linspace(-110, 110, 4001)[:, None].repeat(1, 3)
    made = Routed(logits_TE, [31] * 4001, torch.zeros(3), renormalize=False)
    exact_T = torch.sigmoid(logits_TE[:, 0].double())
    normal_T = exact_T > torch.finfo(torch.float32).tiny
    torch.testing.assert_close(made.weights_TK[normal_T, 0].double(), exact_T[normal_T], rtol=2e-7, atol=0)
    assert made.weights_TK[~normal_T, 0].max() <= torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("renormalize", [True, False])
def test_a_corrupt_allowed_expert_is_seen(drawn: tuple[torch.Tensor, torch.Tensor], renormalize: bool) -> None:
    logits_TE, correction_E = drawn
    logits_TE[:, 1] = math.nan
    made = Routed(logits_TE, [31] * TOKENS, correction_E, renormalize=renormalize)
    assert made.weights_TK.isnan().any(dim=1).all()
    assert {*made.ids_TK.flatten().tolist()} <= set(range(EXPERTS))


@pytest.mark.parametrize(("fill", "unused"), [("none", -1), ("first", 9), (4, 4)])
def test_unused_picks_have_no_weight_and_the_id_that_is_asked_for(
    drawn: tuple[torch.Tensor, torch.Tensor], fill: object, unused: int
) -> None:
    logits_TE, correction_E = drawn
    correction_E[9] = 5.0
    units = [1] * EXPERTS
    units[9] = 0
    made = Routed(logits_TE, [1] * TOKENS, correction_E, fill=fill, unit_of=units)
    assert made.ids_TK.tolist() == [[9, unused, unused]] * TOKENS
    assert made.weights_TK.tolist() == [[1.0, 0.0, 0.0]] * TOKENS


def test_a_token_that_is_allowed_nothing_gets_nothing(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    """As padding does, in a layer without a common expert."""
    logits_TE, correction_E = drawn
    made = Routed(logits_TE, [1] * TOKENS, correction_E, unit_of=[1] * EXPERTS, groups=4, open_groups=2)
    assert not made.weights_TK.any()
    assert not made.ids_TK.any()
    assert not made.mass_TU.any()
    assert not made.chosen_T.any()


def test_the_last_unit_is_a_unit_like_others(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits_TE, correction_E = drawn
    mass_TU, chosen_T = torch.zeros(TOKENS, 64, dtype=torch.int64), torch.zeros(TOKENS, dtype=torch.int64)
    units = [0] * 6 + [63] * 6
    gate_T = torch.full((TOKENS,), -(2**63))
    _, ids_TK = gated_scores(
        padded(logits_TE),
        gate_T,
        unit_E=unit_map(units),
        top_k=TOP_K,
        renormalize=True,
        correction_E=correction_E,
        groups=1,
        open_groups=1,
        scale=1.0,
        mass_TU=mass_TU,
        chosen_T=chosen_T,
        fill="first",
    )
    assert ids_TK.min() >= 6
    assert torch.equal(chosen_T, gate_T)
    assert not mass_TU[:, :63].any()


@pytest.mark.parametrize(("groups", "open_groups"), [(5, 1), (4, 0), (4, 5)])
def test_groups_that_experts_do_not_fall_into_are_refused(
    drawn: tuple[torch.Tensor, torch.Tensor], groups: int, open_groups: int
) -> None:
    with pytest.raises(KernelArgumentError, match=f"^{open_groups} of {groups} groups of 12 experts cannot be open$"):
        Routed(drawn[0], [31] * TOKENS, drawn[1], groups=groups, open_groups=open_groups)
