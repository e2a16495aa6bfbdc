"""Gates in a model's MoE layers: router logits → gate → softmax → top-k → experts.

Legend: T tokens, E experts of the layer, K chosen experts, H hidden size.

:class:`GatedRouter` takes the place of the linear layer that a model routes with. What it gives is already routed:
weights and ids, side by side in the tensor that vLLM passes along as router logits, and an excluded slot's id is never
among them. So the gate is applied here and not in vLLM's router, which under data or expert parallelism sees tokens
gathered from other ranks; :class:`RoutedTopK`, which takes that router's place, only unpacks.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from flexgate.experts.checkpoint.families import Routing, read_family
from flexgate.kernels.gated_topk import Fill, gated_topk, gated_topk_implementation, unit_map
from flexgate.server.engine.core.guard import seal_key_from_environment
from flexgate.server.engine.protocol.slots import SlotTable
from flexgate.server.engine.seam.engine import (
    Attention,
    BaseRouter,
    FusedMoEFactory,
    RoutingMethodType,
    extract_layer_index,
    get_current_vllm_config,
)
from flexgate.server.engine.seam.models import build_model
from flexgate.server.engine.worker.gate_buffers import GateState
from flexgate.server.engine.worker.kernels import chosen_routed_experts
from flexgate.server.engine.worker.layers import GatedLayer

ROUTER_ROWS = 16  # router rows are padded to a multiple, so that a dot product never
# changes its vectorisation, and so its last bit, with the number of experts
EXPERT: Final = re.compile(r"\.layers\.(\d+)\..*\.experts\.(\d+)\.")  # a checkpoint's tensor of one expert
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


ROUTER_OPTIONS: Final = frozenset({"params_dtype", "quant_config"})
"""What a model may ask of its router: rows and logits are float32 all the same, and a quantised model is not served."""


class UntriedLayerError(ValueError):
    """A model builds its MoE layer in a way that was not tried."""


class RoutedTopK(BaseRouter):
    """Unpacks what :class:`GatedRouter` has routed; vLLM calls it inside its MoE runner."""

    def __init__(self, top_k: int, global_num_experts: int) -> None:
        """``top_k`` picks per token."""
        super().__init__(top_k=top_k, global_num_experts=global_num_experts)
        self.place_E: torch.Tensor | None = None
        self.zero_slot = 0

    @property
    def routing_method_type(self) -> RoutingMethodType:
        """Custom: kernels that would route by themselves then refuse this layer."""
        return RoutingMethodType.Custom

    def place_locally(self, local_of_E: torch.Tensor, zero_slot: int) -> None:
        """Map experts to this rank's; what is not here goes to the all-zero one at weight 0.

        Args:
            local_of_E: this rank's index of each expert, negative for other ranks' experts.
            zero_slot: this rank's index of its reserved expert, which holds zeros for ever.
        """
        elsewhere_E = torch.where(local_of_E < 0, zero_slot, local_of_E)
        # Index -1, the id of an unused pick, finds the last entry.
        self.place_E = torch.cat((elsewhere_E, elsewhere_E.new_tensor([zero_slot])))
        self.zero_slot = zero_slot

    def _compute_routing(
        self,
        hidden_states: torch.Tensor,  # noqa: ARG002
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights_TK, ids_TK = router_logits.split(self.top_k, dim=1)
        ids_TK = ids_TK.to(indices_type or torch.int32)
        if self.place_E is not None:
            ids_TK = self.place_E[ids_TK].to(ids_TK.dtype)
            weights_TK = torch.where(ids_TK == self.zero_slot, 0.0, weights_TK)
        return weights_TK.contiguous(), ids_TK.contiguous()


class GatedRouter(nn.Module):
    """A layer's router rows, one per expert, with the gate of each token.

    A plain parameter: on CPU, vLLM's own linear layers give up ``weight`` to oneDNN. What FlexOlmo calls a negative
    bias can only lower a logit (arXiv 2507.07024, section 3.3).

    Attributes:
        unit_E: the slot that each expert belongs to, which is the bit that a gate has for it.
    """

    unit_E: torch.Tensor

    def __init__(
        self, gates: GateState, routing: Routing, layer: int, hidden_size: int, top_k: int, fill: Fill
    ) -> None:
        """All rows and biases start at zero; ``gates`` is shared by all layers."""
        super().__init__()
        self.gates = [gates]  # in a list: the model owns the module
        self.renormalize, self.top_k, self.fill = bool(routing.renormalize), top_k, fill
        self.register_buffer("unit_E", unit_map(gates.table.map.unit_LE[layer]), persistent=False)
        self.num_experts = len(self.unit_E)
        rows = -(-self.num_experts // ROUTER_ROWS) * ROUTER_ROWS
        weight = torch.zeros(rows, hidden_size, dtype=torch.float32)
        self.weight = nn.Parameter(weight, requires_grad=False)
        bias = torch.zeros(self.num_experts, dtype=torch.float32)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.weight.weight_loader = self._load_weight  # type: ignore[attr-defined]
        self.bias.weight_loader = self._load_bias  # type: ignore[attr-defined]
        self.routed_by = gated_topk_implementation(self.unit_E.device)

    def forward(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Weights and ids, [T, 2K], and as vLLM's linear layers no bias to be added later."""
        (gates,) = self.gates
        logits_TE = functional.linear(x_TH.float(), self.weight)[:, : self.num_experts]
        weights_TK, ids_TK = gated_topk(
            logits_TE,
            gates.gate_T[: x_TH.shape[0]],
            unit_E=self.unit_E,
            top_k=self.top_k,
            renormalize=self.renormalize,
            bias_E=self.bias,
            mass_TU=gates.mass_TU,
            chosen_T=gates.chosen_T,
            fill=self.fill,
        )
        return torch.cat((weights_TK, ids_TK.to(weights_TK.dtype)), dim=1), None

    def _load_weight(self, parameter: nn.Parameter, loaded_EH: torch.Tensor) -> None:
        parameter.data.zero_()
        parameter.data[: loaded_EH.shape[0]].copy_(loaded_EH)

    def _load_bias(self, parameter: nn.Parameter, loaded_E: torch.Tensor) -> None:
        parameter.data.zero_()
        parameter.data[: loaded_E.shape[0]].copy_(loaded_E.clamp(max=0))


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
        if untried := _asked_for(asked, besides=ROUTER_OPTIONS):
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
        untried = _asked_for(asked, besides=PASSED_ON | OURS)
        if gate is None or untried:
            raise UntriedLayerError(
                f"{prefix}: flexgate has not been tried with {untried or 'experts without a router'}"
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


def _asked_for(options: Mapping[str, Any], *, besides: Collection[str]) -> str:
    """The names of options that say something, and are none of ``besides``."""
    return ", ".join(sorted(name for name, value in options.items() if _says(value) and name not in besides))


def _says(value: Any) -> bool:
    return not (value is None or (isinstance(value, bool | int | float) and value == 0))


def _is_live(name: str, live_LE: Sequence[Sequence[bool]]) -> bool:
    """Whether a checkpoint's tensor belongs to a live slot's expert, or to none."""
    found = EXPERT.search(name)
    return found is None or live_LE[int(found[1])][int(found[2])]


def expert_parallel_ranks() -> int:
    """How many ranks share out the experts; 1 without expert parallelism."""
    parallel = get_current_vllm_config().parallel_config
    return parallel.tensor_parallel_size if parallel.enable_expert_parallel else 1
