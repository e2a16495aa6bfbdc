"""A model that asks its MoE layers for what was not tried is not built, and vLLM's names are put back."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from flexgate.experts.checkpoint.families import Routing
from flexgate.server.engine.protocol.handshake import ungated_layers
from flexgate.server.engine.protocol.slots import SlotMap
from flexgate.server.engine.seam import models
from flexgate.server.engine.worker import moe
from flexgate.server.engine.worker.kernels import FlexgateExperts
from flexgate.server.engine.worker.layers import GatedLayer
from flexgate.server.engine.worker.moe import LayerBuilder, UntriedLayerError
from flexgate.server.engine.worker.router import GatedRouter, NotRoutedError, RoutedTopK
from flexgate.server.engine.worker.slot_arrays import low_rank_experts

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
        {"reduce_results": False},
        {"routed_scaling_factor": 0},
        {"scoring_func": None},
        {"a_later_versions_argument": 1},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_a_kind_of_routing_that_was_not_tried_is_refused(builder: LayerBuilder, asked: dict[str, Any]) -> None:
    builder.router(32, 3, prefix="model.layers.0.mlp.gate")
    with pytest.raises(UntriedLayerError, match=f"{PREFIX}: flexgate has not been tried with .*{next(iter(asked))}"):
        builder.experts(prefix=PREFIX, num_experts=3, top_k=2, hidden_size=32, intermediate_size=16, **asked)


def test_what_vllm_does_by_default_may_be_asked_for(builder: LayerBuilder) -> None:
    by_default = {"reduce_results": True, "scoring_func": "softmax", "routed_scaling_factor": 1.0, "activation": "silu"}
    builder.router(32, 3, prefix="model.layers.0.mlp.gate", bias=False, out_dtype=None)
    with pytest.raises(UntriedLayerError, match=r"not been tried with has_bias$"):
        builder.experts(prefix=PREFIX, num_experts=3, top_k=2, has_bias=True, **by_default)


def test_experts_of_another_number_than_configured_are_refused(builder: LayerBuilder) -> None:
    builder.router(32, 3, prefix="model.layers.0.mlp.gate")
    with pytest.raises(UntriedLayerError, match=f"{PREFIX}: asks for 1 experts per token, config.json for 2"):
        builder.experts(prefix=PREFIX, num_experts=3, top_k=1, hidden_size=32, intermediate_size=16)


def routed(tokens_EH: torch.Tensor, *, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer's experts are given for tokens whose router has these rows, of three experts of two units."""
    tokens, hidden = tokens_EH.shape
    gates: Any = SimpleNamespace(
        table=GATES.table,
        gate_T=torch.full((tokens,), 0b11),
        mass_TU=torch.zeros(tokens, 2, dtype=torch.int64),
        chosen_T=torch.zeros(tokens, dtype=torch.int64),
    )
    gate = GatedRouter(gates, Routing(renormalize=renormalize), 0, hidden, 2, "first")
    gate.weight.data[:3] = torch.eye(3, hidden)
    packed, bias = gate(tokens_EH)
    assert bias is None
    return RoutedTopK(2, 3)._compute_routing(tokens_EH, packed, None)


def test_weights_are_renormalized_where_the_model_says_so_and_nowhere_else() -> None:
    logits_TE = torch.tensor([[1.0, 3.0, 2.0], [0.5, -1.0, 0.25]])
    probabilities_TK, ids_TK = torch.softmax(logits_TE, -1).topk(2)
    for renormalize, expected_TK in (
        (False, probabilities_TK),
        (True, probabilities_TK / probabilities_TK.sum(-1, keepdim=True)),
    ):
        weights_TK, picks_TK = routed(logits_TE, renormalize=renormalize)
        assert torch.equal(picks_TK, ids_TK.int())
        torch.testing.assert_close(weights_TK, expected_TK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [3, 4, 5])
def test_router_logits_that_no_gate_has_routed_are_refused(experts: int, dtype: torch.dtype) -> None:
    """Four experts, top-2: as many numbers as two weights and two ids."""
    with pytest.raises(NotRoutedError, match=rf"^experts were given {dtype} \[tokens, {experts}\] to choose by"):
        RoutedTopK(2, experts)._compute_routing(torch.zeros(2, 8), torch.zeros(2, experts, dtype=dtype), None)


def test_picks_of_another_number_are_refused() -> None:
    with pytest.raises(NotRoutedError, match=r"expected what their gate has chosen: int32 \[tokens, 4\]$"):
        RoutedTopK(2, 4)._compute_routing(torch.zeros(2, 8), torch.zeros(2, 6, dtype=torch.int32), None)


class Block(nn.Module):
    """What a model's class makes of one layer: its gate, and vLLM's runner with our router."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(2, 2), nn.Module()
        self.experts.router, self.experts.gate = nn.Module(), None


def model_of(layers: int = 2) -> tuple[nn.Module, list[GatedLayer]]:
    """A model, and its layers as they were built."""
    model = nn.Module()
    model.layers = nn.ModuleList(Block() for _ in range(layers))
    blocks: Any = model.layers
    return model, [
        GatedLayer(f"layers.{number}.experts", block.gate, block.experts.router, block.experts)
        for number, block in enumerate(blocks)
    ]


def another_gate(block: Any) -> None:
    block.gate = nn.Linear(2, 2)


def other_experts(block: Any) -> None:
    block.experts = nn.Module()


def another_router(block: Any) -> None:
    block.experts.router = nn.Module()


def another_gate_in_the_runner(block: Any) -> None:
    block.experts.gate = nn.Linear(2, 2)


def no_gate(block: Any) -> None:
    del block.gate


NAMES = ["layers.0.experts", "layers.1.experts"]


def test_layers_that_their_gates_route_for_are_not_among_the_ungated() -> None:
    model, layers = model_of()
    assert ungated_layers(layers, NAMES, model) == []
    blocks: Any = model.layers
    blocks[1].experts.gate = blocks[1].gate  # as Qwen3-MoE does
    assert ungated_layers(layers, NAMES, model) == []


@pytest.mark.parametrize("spoil", [another_gate, other_experts, another_router, another_gate_in_the_runner, no_gate])
def test_a_layer_that_its_gate_does_not_route_for_is_found(spoil: Callable[[Any], None]) -> None:
    model, layers = model_of()
    blocks: Any = model.layers
    spoil(blocks[1])
    assert ungated_layers(layers, NAMES, model) == ["layers.1.experts"]
    assert ungated_layers(layers, [], model) == NAMES


def test_a_layer_that_is_built_without_a_gate_is_found_and_one_that_vllm_does_not_know() -> None:
    model, layers = model_of()
    assert ungated_layers(layers[:1], NAMES, model) == ["layers.1.experts"]
    assert ungated_layers([], NAMES, model) == NAMES
    assert ungated_layers(layers, NAMES[:1], model) == ["layers.1.experts"]
    assert ungated_layers(layers, [], model) == NAMES


def test_ranks_are_those_of_the_factors_that_a_kernel_computes_with() -> None:
    held = low_rank_experts([3, 3, 1], torch.zeros(2, 8, 4))
    kernel = FlexgateExperts.__new__(FlexgateExperts)
    method = SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=kernel))
    runner = SimpleNamespace(routed_experts=SimpleNamespace(smaller=held, quant_method=method))
    unused: Any = None
    layer = GatedLayer("layers.0.experts", unused, unused, runner)
    assert layer.low_ranks == []
    kernel.smaller = held
    assert layer.low_ranks == [3, 3, 1]
    assert layer.factors[2][0].data_ptr() == held[1].a13_SQH.data_ptr()


def asked_by_glm(**changes: Any) -> str:
    """What is refused of a layer whose router chooses by scores; an expert's bias always is."""
    routing = Routing(renormalize=True, scoring="sigmoid", groups=1, open_groups=1, scale=2.5)
    builder = LayerBuilder(GATES, routing, 2)
    gate = builder.router(32, 3, prefix="model.layers.0.mlp.gate", out_dtype=torch.float32, params_dtype=torch.float32)
    gate.e_score_correction_bias = nn.Parameter(torch.zeros(3))
    asked = {
        "scoring_func": "sigmoid",
        "use_grouped_topk": True,
        "num_expert_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "apply_routed_scale_to_output": True,
        "router_logits_dtype": torch.float32,
        "e_score_correction_bias": gate.e_score_correction_bias,
        "shared_expert_prefix": "model.layers.0.mlp.shared_experts",
        "fuse_shared_experts": False,
        "n_shared_experts": None,
    }
    given = {name: value for name, value in (asked | changes).items() if value is not LEFT_OUT}
    with pytest.raises(UntriedLayerError) as refused:
        builder.experts(prefix=PREFIX, num_experts=3, top_k=2, has_bias=True, **given)
    return str(refused.value).removeprefix(f"{PREFIX}: flexgate has not been tried with ")


LEFT_OUT = object()


def test_what_a_sigmoid_router_does_may_be_asked_for_as_it_is_and_not_otherwise(builder: LayerBuilder) -> None:
    assert builder.layers == []  # one rank
    assert asked_by_glm() == "has_bias"
    others: dict[str, Any] = {
        "scoring_func": "softmax",
        "num_expert_group": 2,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
        "use_grouped_topk": LEFT_OUT,
        "e_score_correction_bias": torch.zeros(3),
        "fuse_shared_experts": True,
        "n_shared_experts": 1,
    }
    for name, value in others.items():
        assert name in asked_by_glm(**{name: value}), name


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
