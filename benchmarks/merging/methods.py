"""The rows of the report: how each predicts, and which trials choose its one number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from flexgate.experts.evaluation.gates import opt_out_gates
from flexgate.experts.evaluation.predict import Predict, ensemble, gated, log_posterior, routed, soup
from flexgate.experts.training.model import FlexOlmo
from merging.bench import Bench
from merging.settings import Settings
from merging.texts import all_ids, closed_ids

OURS: Final = "all experts"
UNRESTRICTED: Final = "unrestricted MoE"
MERGING: Final = (
    "model soup",
    "model soup, weighted",
    "BTM, all",
    "BTM, top-2",
    "domain classifier",
    "BTX-style router",
    "model soup, lone experts",
    "model soup, weighted, lone experts",
    "BTM, all, lone experts",
    "BTM, top-2, lone experts",
    "domain classifier, lone experts",
)
"""What combines experts without seeing closed text; *lone* experts were trained without the public one beside them."""
ABLATIONS: Final = {
    "no coordination": "uncoordinated",
    "no bias": "unbiased",
    "no domain initialisation": "uninitialised",
}
TUNED: Final = "router tuning"


@dataclass(frozen=True)
class Method:
    """``make`` gets the value that its trials chose; without trials there is nothing to choose and it gets 0."""

    name: str
    trials: tuple[float, ...]
    make: Callable[[Bench, float], Predict]


def ours(settings: Settings) -> Method:
    """The merge; what is tried is the owners' learning rate."""
    return Method(OURS, settings.owner_trials, lambda bench, peak: everything(bench.merged("coordinated", peak)))


def others(settings: Settings, peak: float) -> tuple[Method, ...]:
    """Every other method, on experts trained with the rate ``peak``."""
    return (
        *_merging(settings, peak, "coordinated", ""),
        *_merging(settings, peak, "uncoordinated", ", lone experts"),
        Method("BTX-style router", settings.router_trials, lambda b, value: everything(b.rerouted("btx", value, peak))),
        Method(TUNED, settings.router_trials, lambda bench, value: everything(bench.rerouted("tuned", value, peak))),
        Method(
            UNRESTRICTED,
            settings.joint_trials,
            lambda bench, value: everything(bench.unrestricted(value, bench.joint_steps()[0])),
        ),
        *(Method(name, (), _ablated(variant, peak)) for name, variant in ABLATIONS.items()),
        *(_matrix_row(gate, allowed, peak) for gate, allowed in opt_out_gates(all_ids()).items() if gate != OURS),
        *(Method(f"never had {owner}", (), _never(owner, peak)) for owner in closed_ids()),
    )


def choosers(bench: Bench, peak: float, chosen: Mapping[str, float]) -> dict[str, Callable[[Tensor], Tensor]]:
    """How the methods that choose between whole models place a text, given what their trials chose."""

    def btm(variant: str, name: str) -> Callable[[Tensor], Tensor]:
        members = _members(bench.merged(variant, peak), beside_public=variant == "coordinated")
        return lambda tokens_BT: log_posterior(
            torch.stack([member(tokens_BT) for member in members]), tokens_BT, None, chosen[name]
        ).argmax(0)

    return {
        "domain classifier": bench.classifier(chosen["domain classifier"]).domain,
        "BTM, all": btm("coordinated", "BTM, all"),
        "BTM, all, lone experts": btm("uncoordinated", "BTM, all, lone experts"),
    }


def everything(model: FlexOlmo) -> Predict:
    """The model with all its experts."""
    return gated(model, [True] * model.architecture.num_experts)


def _merging(settings: Settings, peak: float, variant: str, suffix: str) -> tuple[Method, ...]:
    def members(bench: Bench) -> list[Predict]:
        return _members(bench.merged(variant, peak), beside_public=variant == "coordinated")

    def mixed(bench: Bench, public_share: float) -> Predict:
        others = (1 - public_share) / len(closed_ids())
        return everything(soup(bench.merged(variant, peak), [public_share, *[others] * len(closed_ids())]))

    return (
        Method(f"model soup{suffix}", (), lambda bench, _: mixed(bench, 1 / len(all_ids()))),
        Method(f"model soup, weighted{suffix}", settings.soup_trials, mixed),
        Method(f"BTM, all{suffix}", settings.btm_trials, lambda b, value: ensemble(members(b), confidence=value)),
        Method(
            f"BTM, top-2{suffix}", settings.btm_trials, lambda b, value: ensemble(members(b), top=2, confidence=value)
        ),
        Method(
            f"domain classifier{suffix}",
            settings.classifier_trials,
            lambda bench, value: routed(members(bench), bench.classifier(value)),
        ),
    )


def _members(model: FlexOlmo, *, beside_public: bool) -> list[Predict]:
    """The public expert, and each owner's as it was trained: beside the public one, or alone."""
    experts = range(model.architecture.num_experts)
    return [gated(model, [index == own or (beside_public and index == 0) for index in experts]) for own in experts]


def _ablated(variant: str, peak: float) -> Callable[[Bench, float], Predict]:
    return lambda bench, _: everything(bench.merged(variant, peak))


def _never(owner: str, peak: float) -> Callable[[Bench, float], Predict]:
    return lambda bench, _: everything(bench.merged("coordinated", peak, never=owner))


def _matrix_row(gate: str, allowed: Sequence[bool], peak: float) -> Method:
    return Method(gate, (), lambda bench, _: gated(bench.merged("coordinated", peak), allowed))
