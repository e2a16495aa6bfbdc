"""What "equal" means: bits under one schedule, DESIGN's tolerance across schedules."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM

from enginekit.scripted import Answer, Ask
from flexgate.kernels.gated_topk import MASS_SCALE

TOLERANCE = 2e-5  # of a log-probability, in float32
NEAR_TIE = 1e-3  # top-2 gap under which another schedule may choose the other token


def same_bits(one: Answer, other: Answer) -> bool:
    """Whether two answers are identical to the last bit."""
    return (one.tokens, one.logprobs) == (other.tokens, other.logprobs)


def agree(want: Answer, got: Answer) -> bool:
    """Equal within tolerance, up to the first near-tie that went the other way."""
    for want_top, got_top, want_token, got_token in zip(
        want.logprobs, got.logprobs, want.tokens, got.tokens, strict=True
    ):
        first, second = sorted((value for _, value in want_top), reverse=True)[:2]
        if want_token != got_token:
            return first - second <= NEAR_TIE
        common = dict(want_top).keys() & dict(got_top).keys()
        if max(abs(dict(want_top)[token] - dict(got_top)[token]) for token in common) > TOLERANCE:
            return False
    return True


def reference(checkpoint: Path) -> Any:
    """The same checkpoint in transformers."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def cut_reference(checkpoint: Path, kept_L: Sequence[Sequence[int]]) -> Any:
    """The checkpoint in transformers with only some experts of each layer, which may be of different number. Of
    routers whose experts fall into groups, the others stay where they are, and are not chosen.

    Args:
        kept_L: empty for a layer that has no experts.
    """
    model = reference(checkpoint)
    for layer, kept in zip(model.model.layers, kept_L, strict=True):
        if not kept:
            continue
        router, experts = layer.mlp.gate, layer.mlp.experts
        if has_holes(router):
            if len(kept) < router.num_experts:
                router.forward = partial(_route_by_scores, router, kept)
            continue
        router.weight = torch.nn.Parameter(router.weight[list(kept)])
        router.num_experts, router.top_k = len(kept), min(router.top_k, len(kept))
        experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj[list(kept)])
        experts.down_proj = torch.nn.Parameter(experts.down_proj[list(kept)])
        experts.num_experts = len(kept)
    return model


def has_holes(router: Any) -> bool:
    """Whether what is excluded stays in its place: groups go by that."""
    return hasattr(router, "e_score_correction_bias")


def _route_by_scores(
    router: Any, kept: Sequence[int], hidden_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What transformers' router does, token by token, with the experts ``kept`` alone; the first pick fills up."""
    rows = hidden_states.reshape(-1, router.hidden_dim).float()
    logits_TE = torch.nn.functional.linear(rows, router.weight.float())
    score_TE = logits_TE.sigmoid()
    ids_TK = torch.zeros(len(rows), router.top_k, dtype=torch.int64)
    weights_TK = torch.zeros(len(rows), router.top_k)
    for token, score_E in enumerate(score_TE):
        choice_E = (score_E + router.e_score_correction_bias).tolist()
        picks = choose_by_scores(choice_E, kept, router.num_group, router.topk_group, router.top_k)
        ids_TK[token] = torch.tensor(picks + picks[:1] * (router.top_k - len(picks)))
        weights_TK[token, : len(picks)] = score_E[picks]
    if router.norm_topk_prob:
        weights_TK /= weights_TK.sum(dim=-1, keepdim=True) + 1e-20
    return logits_TE, weights_TK * router.routed_scaling_factor, ids_TK


def choose_by_scores(
    choice_E: Sequence[float], kept: Sequence[int], groups: int, open_groups: int, top_k: int
) -> list[int]:
    """The best of ``kept`` by corrected scores, within the groups of the best two that are kept."""
    size = len(choice_E) // groups
    by_group: dict[int, list[float]] = {}
    for expert in kept:
        by_group.setdefault(expert // size, []).append(choice_E[expert])
    ranked = sorted(by_group, key=lambda group: (-sum(sorted(by_group[group])[-2:]), group))[:open_groups]
    return sorted((e for e in kept if e // size in ranked), key=lambda expert: (-choice_E[expert], expert))[:top_k]


def biased_reference(checkpoint: Path, bias_LE: torch.Tensor) -> Any:
    """The checkpoint in transformers, which knows no router bias, with min(b, 0) added to its logits."""
    model = reference(checkpoint)
    for layer, bias_E in zip(model.model.layers, bias_LE, strict=True):
        layer.mlp.gate.forward = partial(_route, layer.mlp.gate, bias_E.clamp(max=0))
    return model


def _route(
    router: Any, bias_E: torch.Tensor, hidden_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits_TE = torch.nn.functional.linear(hidden_states, router.weight) + bias_E
    weights_TK, ids_TK = torch.softmax(logits_TE, dim=-1).topk(router.top_k, dim=-1)
    return logits_TE, weights_TK, ids_TK


def assert_usage_is_transformers(model: Any, ask: Ask, answer: Answer) -> None:
    """Compare an answer's usage with the routing that transformers computes for its tokens under its gate.

    Every position counts once, those read from the cache included, and the prompt once for all choices; the last token
    of a choice is generated and not read.
    """
    slots, first, prompt = len(answer.mass), answer.prompt_positions, len(ask.prompt)
    mass_U, chosen_U = torch.zeros(slots, dtype=torch.float64), torch.zeros(slots, dtype=torch.int64)
    for number, choice in enumerate(answer.choices or ((),)):
        mass_PU, chosen_PU = _routed(model, ask, choice, slots)
        counted = [*range(first if number == 0 else 0), *range(prompt, len(mass_PU))]
        mass_U += mass_PU[counted].sum(0)
        chosen_U += chosen_PU[counted].sum(0)
    assert list(answer.chosen) == chosen_U.tolist()
    assert [part / MASS_SCALE for part in answer.mass] == pytest.approx(mass_U.tolist(), rel=1e-4)


def _routed(model: Any, ask: Ask, choice: Sequence[int], slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each position its weights, summed over layers, and whether it chose a slot in any; both [P, U]."""
    ids = torch.tensor([[*ask.prompt, *choice[:-1]]])
    mass_PU = torch.zeros(ids.shape[1], slots, dtype=torch.float64)
    chosen_PU = torch.zeros(ids.shape[1], slots, dtype=torch.bool)
    for logits_PE in gated_router_logits(model, ids, ask.gate):
        k = min(model.config.num_experts_per_tok, len(ask.gate))
        weights_PK, picks_PK = torch.softmax(logits_PE.float(), dim=-1).topk(k, dim=-1)
        mass_PU.scatter_add_(1, picks_PK, weights_PK.double())
        chosen_PU.scatter_(1, picks_PK, True)
    return mass_PU, chosen_PU


def gated_router_logits(model: Any, ids: torch.Tensor, gate: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Every layer's router logits, [P, E], with −inf for experts outside of the gate, which take no part."""
    outside = [expert for expert in range(model.config.num_experts) if expert not in gate]
    found: list[torch.Tensor] = []

    def route(router: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = torch.nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
        logits[:, outside] = -torch.inf
        found.append(logits)
        weights, picks = torch.softmax(logits, dim=-1).topk(router.top_k, dim=-1)
        return logits, weights, picks

    routers = [layer.mlp.gate for layer in model.model.layers]
    with torch.no_grad(), ExitStack() as patched:
        for router in routers:
            patched.enter_context(mock.patch.object(router, "forward", partial(route, router)))
        model(ids)
    return tuple(found)


def usage_of_routing(
    model: Any, kept_L: Sequence[Sequence[int]], unit_LE: Sequence[Sequence[int]], units: int, tokens: Sequence[int]
) -> tuple[list[int], list[float]]:
    """How many positions chose each unit, and each unit's routed weight, by what transformers' routers do.

    Args:
        model: with only the experts ``kept_L``, as `cut_reference` gives it.
        tokens: those that were read.
    """
    chosen_PU, mass_U = torch.zeros(len(tokens), units, dtype=torch.bool), torch.zeros(units, dtype=torch.float64)

    def noted(kept: Sequence[int], unit_E: Sequence[int], scale: float) -> Any:
        def hook(_router: Any, _given: Any, routed: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
            _, weights_PK, picks_PK = routed
            units_PK = torch.tensor([unit_E[expert] for expert in kept])[picks_PK]
            chosen_PU.scatter_(1, units_PK, True)
            mass_U.scatter_add_(0, units_PK.flatten(), weights_PK.double().flatten() / scale)

        return hook

    for layer, kept, unit_E in zip(model.model.layers, kept_L, unit_LE, strict=True):
        if kept:
            router = layer.mlp.gate
            present = range(len(unit_E)) if has_holes(router) else kept
            scale = getattr(router, "routed_scaling_factor", 1.0)
            router.register_forward_hook(noted(present, unit_E, scale))
    with torch.no_grad():
        model(torch.tensor([list(tokens)]))
    return chosen_PU.sum(0).tolist(), mass_U.tolist()


def worst_difference(model: Any, prompt: tuple[int, ...], answer: Answer) -> float:
    """Largest gap between the engine's log-probabilities and transformers' on the same tokens."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer.tokens])).logits[0]
    expected = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 :]
    return max(
        abs(expected[position, token].item() - value)
        for position, tokens in enumerate(answer.logprobs)
        for token, value in tokens
    )
