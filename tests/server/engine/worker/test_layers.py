"""A model that asks its MoE layers for what was not tried is not built, and vLLM's names are put back."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexgate.experts.checkpoint.families import Routing
from flexgate.server.engine.protocol.slots import SlotMap
from flexgate.server.engine.seam import models
from flexgate.server.engine.worker import moe
from flexgate.server.engine.worker.moe import GatedRouter, LayerBuilder, UntriedLayerError

GATES: Any = SimpleNamespace(table=SimpleNamespace(map=SlotMap(2, (b"\0\1\1",))))
PREFIX = "model.layers.0.mlp.experts"


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> LayerBuilder:
    monkeypatch.setattr(moe, "expert_parallel_ranks", lambda: 1)
    return LayerBuilder(GATES, Routing(renormalize=False), 2)


@pytest.mark.parametrize(
    "asked",
    [
        {"scoring_func": "sigmoid"},
        {"use_grouped_topk": True, "topk_group": 2},
        {"e_score_correction_bias": torch.zeros(3)},
        {"routed_scaling_factor": 2.5},
        {"custom_routing_function": print},
        {"enable_eplb": True},
        {"apply_router_weight_on_input": True},
        {"has_bias": True},
        {"a_later_versions_argument": 1},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_a_kind_of_routing_that_was_not_tried_is_refused(builder: LayerBuilder, asked: dict[str, Any]) -> None:
    builder.router(32, 3, prefix="model.layers.0.mlp.gate")
    with pytest.raises(UntriedLayerError, match=f"{PREFIX}: flexgate has not been tried with .*{next(iter(asked))}"):
        builder.experts(prefix=PREFIX, num_experts=3, top_k=2, hidden_size=32, intermediate_size=16, **asked)


def test_a_router_with_a_bias_is_refused(builder: LayerBuilder) -> None:
    with pytest.raises(UntriedLayerError, match="gate: flexgate has not been tried with bias"):
        builder.router(32, 3, bias=True, prefix="model.layers.0.mlp.gate")


def test_experts_without_a_router_are_refused(builder: LayerBuilder) -> None:
    builder.router(32, 3, prefix="model.layers.0.mlp.gate")
    with pytest.raises(UntriedLayerError):
        builder.experts(prefix=PREFIX, enable_eplb=True)
    with pytest.raises(UntriedLayerError, match="experts without a router"):
        builder.experts(prefix=PREFIX, num_experts=3, top_k=2)


def test_a_models_module_has_vllms_names_again_when_it_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.models import olmoe

    usual, seen = (olmoe.GateLinear, olmoe.FusedMoEFactory), []

    def build(**_: Any) -> None:
        seen.append((olmoe.GateLinear, olmoe.FusedMoEFactory))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(olmoe, "OlmoeForCausalLM", build)
    with pytest.raises(RuntimeError, match="out of memory"):
        models.build_model("OlmoeForCausalLM", GatedRouter, print)
    assert seen == [(GatedRouter, print)]
    assert (olmoe.GateLinear, olmoe.FusedMoEFactory) == usual


@pytest.mark.parametrize("architecture", models.MODELS)
def test_every_models_module_has_the_names_that_are_replaced(architecture: str) -> None:
    from importlib import import_module

    module = import_module(models.MODELS[architecture])
    assert all(hasattr(module, name) for name in (models.ROUTER, models.EXPERTS, architecture))
