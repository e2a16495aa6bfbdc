"""Gates in a model's MoE layers: router logits → gate → chosen experts → experts.

vLLM's class of a model is built with :class:`GatedRouter <flexgate.server.engine.worker.router.GatedRouter>` for its
router and our own routing for its experts; what it asks of them that was not tried is refused.
"""

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn

from flexgate.experts.checkpoint.families import Routing, read_family
from flexgate.kernels.gated_topk import Fill
from flexgate.server.engine.core.guard import seal_key_from_environment
from flexgate.server.engine.protocol.slots import SlotTable
from flexgate.server.engine.seam.engine import (
    Attention,
    FusedMoEFactory,
    GateLinear,
    extract_layer_index,
    get_current_vllm_config,
)
from flexgate.server.engine.seam.models import build_model
from flexgate.server.engine.worker.gate_buffers import GateState
from flexgate.server.engine.worker.kernels import chosen_routed_experts
from flexgate.server.engine.worker.layers import GatedLayer
from flexgate.server.engine.worker.router import GatedRouter, RoutedTopK

EXPERT: Final = re.compile(r"\.layers\.(\d+)\..*\.experts\.(\d+)\.")  # a checkpoint's tensor of one expert
LAYER: Final = re.compile(r"\.layers\.(\d+)\.")
PASSED_ON: Final = frozenset(
    {
        "hidden_size",
        "intermediate_size",
        "params_dtype",
        "quant_config",
        "tp_size",
        "dp_size",
        "ckpt_names",
        "gate",
        "shared_experts",
    }
)
"""What a model may ask of its experts that says nothing about routing; passed on as it is."""
OURS: Final = frozenset({"num_experts", "top_k", "renormalize"})
"""What is decided here: by the slot map, and by the configuration with the table of families."""


ROUTER_OPTIONS: Final = frozenset({"params_dtype", "out_dtype", "quant_config"})
"""What a model may ask of its router: rows and logits are float32 all the same, and a quantised model is not served."""


_OTHER: Final = object()
"""In place of a value that is not the one which is computed; no default equals it."""


class UntriedLayerError(ValueError):
    """A model builds its MoE layer in a way that was not tried."""


class LayerBuilder:
    """What a model's class gets in place of vLLM's router and experts, for each of its MoE layers.

    Attributes:
        layers: those that were built, in the model's order.
    """

    def __init__(self, gates: GateState, routing: Routing, top_k: int) -> None:
        """``routing`` and ``top_k`` are the same for all layers."""
        self.layers: list[GatedLayer] = []
        self._gates, self._routing, self._top_k = gates, routing, top_k
        self._gate: GatedRouter | None = None
        # vLLM's CPU kernel knows no expert map: experts dealt out to ranks in turn, and after
        # them as many reserved ones, give every rank exactly one that stays all zero.
        self._ranks = expert_parallel_ranks()
        self._reserved = self._ranks if self._ranks > 1 else 0

    def router(self, hidden_size: int, _num_experts: int, *, prefix: str, **asked: Any) -> GatedRouter:
        """In place of ``GateLinear``; how many experts there are, the slot map says.

        Raises:
            UntriedLayerError: the model asks for a kind of router that was not tried.
        """
        if untried := _asked_for(asked, GateLinear, besides=ROUTER_OPTIONS):
            raise UntriedLayerError(f"{prefix}: flexgate has not been tried with {untried}")
        fill: Fill = "none" if self._reserved else "first"
        self._gate = GatedRouter(
            self._gates, self._routing, extract_layer_index(prefix), hidden_size, self._top_k, fill
        )
        return self._gate

    def experts(self, *, prefix: str, **asked: Any) -> Any:
        """In place of ``FusedMoEFactory``, for the router that was made just before.

        Raises:
            UntriedLayerError: the model asks for a kind of routing, or of experts, that was not tried.
        """
        gate, self._gate = self._gate, None
        untried = _asked_for(self._unlike_routing(asked, gate), FusedMoEFactory, besides=PASSED_ON | OURS)
        if gate is None or untried:
            raise UntriedLayerError(
                f"{prefix}: flexgate has not been tried with {untried or 'experts without a router'}"
            )
        if asked.get("top_k") != self._top_k:
            raise UntriedLayerError(
                f"{prefix}: asks for {asked.get('top_k')} experts per token, config.json for {self._top_k}"
            )
        ranks = self._gates.table.map.low_ranks
        full = gate.num_experts - len(ranks)
        router = RoutedTopK(self._top_k, gate.num_experts + self._reserved)
        experts = FusedMoEFactory(
            **{name: value for name, value in asked.items() if name in PASSED_ON},
            prefix=prefix,
            num_experts=full + self._reserved,
            top_k=self._top_k,
            router=router,
            num_expert_group=max(2, self._ranks),  # vLLM deals out experts of a grouped model only
            routed_experts_cls=chosen_routed_experts(),
        )
        if ranks:
            experts.routed_experts.keep_factors(ranks)
        if self._reserved:
            local_of_E = experts.routed_experts.expert_map.long()
            zero_slot = int(local_of_E[gate.num_experts :].max())
            router.place_locally(local_of_E[: gate.num_experts], zero_slot)
        self.layers.append(GatedLayer(prefix, gate, router, experts))
        return experts

    def _unlike_routing(self, asked: Mapping[str, Any], gate: GatedRouter | None) -> dict[str, Any]:
        """What a model asks of its experts that is not the routing which ours does."""
        routing = self._routing
        if routing.scoring == "softmax":
            return dict(asked)
        said = {
            "scoring_func": routing.scoring,
            "use_grouped_topk": True,
            "num_expert_group": routing.groups,
            "topk_group": routing.open_groups,
            "routed_scaling_factor": routing.scale,
            "apply_routed_scale_to_output": True,  # it is in the weights, and so in the output once
            "router_logits_dtype": torch.float32,
            "e_score_correction_bias": getattr(gate, "e_score_correction_bias", _OTHER),
        }
        other = [name for name, value in said.items() if not _equal(asked.get(name), value)]
        prefix = "shared_expert_prefix"  # of a shared expert that is fused, which is refused
        rest = {name: value for name, value in asked.items() if name not in said and name != prefix}
        return rest | dict.fromkeys(other, _OTHER)


class GatedModel(nn.Module):
    """A model whose MoE layers are gated; what vLLM instantiates for every architecture of the seam's table."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        """Built by vLLM on every rank; the gate buffers are this module's own."""
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.gates = GateState(
            SlotTable.from_config(vllm_config.additional_config),
            vllm_config.scheduler_config.max_num_batched_tokens,
            seal_key_from_environment(),
        )
        values = self.config.to_dict()
        builder = LayerBuilder(self.gates, read_family(values).routing.of(values), self.config.num_experts_per_tok)
        (architecture,) = self.config.architectures
        self.model = build_model(architecture, builder.router, builder.experts, vllm_config=vllm_config, prefix=prefix)
        self._layers = builder.layers

    @staticmethod
    def get_model_state_cls() -> type[Any]:
        """Model Runner V2 asks for the class that prepares each step's inputs."""
        from flexgate.server.engine.worker.worker import GatedModelState

        return GatedModelState

    def moe_layers(self) -> list[GatedLayer]:
        """The gated layers, first layer first."""
        return self._layers

    def kv_caches(self) -> list[torch.Tensor]:
        """Each layer's KV cache, as vLLM has bound it."""
        return [module.kv_cache for module in self.modules() if isinstance(module, Attention)]

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings, [T, H]."""
        embedded: torch.Tensor = self.model.embed_input_ids(input_ids)
        return embedded

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states, [T, H]; the argument names are vLLM's."""
        hidden: torch.Tensor = self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        self.gates.note(hidden)
        return hidden

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits over the vocabulary for the positions that are sampled."""
        logits: torch.Tensor | None = self.model.compute_logits(hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Zero every expert, then load those of live slots; router biases are optional.

        An expert of the checkpoint that was revoked is not read, and its router row is zero.
        """
        table = self.gates.table
        live_LE = [[unit in table.live for unit in unit_E] for unit_E in table.map.unit_LE]
        for layer in self._layers:
            layer.empty()
        loaded: set[str] = self.model.load_weights(pair for pair in weights if _is_live(pair[0], live_LE))
        for layer in self._layers:
            layer.clear_rows(table.live)
        # A bias is optional, and a layer whose experts were all revoked has nothing to load.
        names = [name for name, _ in self.named_parameters()]
        return {f"model.{name}" for name in loaded}.union(
            name for name in names if name.endswith("gate.bias") or ".experts." in name
        )


def _asked_for(options: Mapping[str, Any], made_by: Callable[..., Any], *, besides: Collection[str]) -> str:
    """The names of options that are neither ``besides`` nor what ``made_by`` has for them by default."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(made_by).parameters.items()}
    said = {name for name, value in options.items() if name not in defaults or not _equal(value, defaults[name])}
    return ", ".join(sorted(said - {*besides}))


def _equal(value: Any, default: Any) -> bool:
    return value is default or (
        type(value) is type(default) and isinstance(value, bool | int | float | str) and value == default
    )


def _is_live(name: str, live_LE: Sequence[Sequence[bool]]) -> bool:
    """Whether a checkpoint's tensor belongs to a live slot's expert, or to none, and to a layer that is served."""
    layer, found = LAYER.search(name), EXPERT.search(name)
    if layer is not None and int(layer[1]) >= len(live_LE):
        return False
    return found is None or live_LE[int(found[1])][int(found[2])]


def expert_parallel_ranks() -> int:
    """How many ranks share out the experts; 1 without expert parallelism."""
    parallel = get_current_vllm_config().parallel_config
    return parallel.tensor_parallel_size if parallel.enable_expert_parallel else 1
