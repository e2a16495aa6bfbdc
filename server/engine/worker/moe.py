"""The gated MoE block: logits → gate → softmax → top-k → experts.

Legend: T tokens, E experts of the layer, K chosen experts, H hidden size.

The gate is applied here, in the model, and not in vLLM's router, because under data or
expert parallelism the router sees tokens gathered from other ranks. What goes on is
already routed: weights and ids, side by side in the tensor that vLLM passes along as
router logits. An excluded slot's id is never among them.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from flexgate.kernels.gated_topk import Fill, gated_topk, gated_topk_implementation, unit_map
from flexgate.server.engine.seam.engine import BaseRouter, FusedMoEFactory, RoutingMethodType, get_current_vllm_config
from flexgate.server.engine.worker.gate_buffers import GateState
from flexgate.server.engine.worker.kernels import chosen_routed_experts, held_kernels, pack_of
from flexgate.server.engine.worker.slot_arrays import Pack, SlotArrays

ROUTER_ROWS = 16  # router rows are padded to a multiple, so that a dot product never
# changes its vectorisation, and so its last bit, with the number of experts


class RoutedTopK(BaseRouter):
    """Unpacks what :class:`GatedMoE` has routed; vLLM calls it inside its MoE runner."""

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


class RouterRows(nn.Module):
    """Router rows, one per expert, and an optional bias that can only lower a logit.

    A plain parameter: on CPU, vLLM's own linear layers give up ``weight`` to oneDNN.
    """

    def __init__(self, num_experts: int, hidden_size: int) -> None:
        """All rows and biases start at zero."""
        super().__init__()
        rows = -(-num_experts // ROUTER_ROWS) * ROUTER_ROWS
        self.num_experts = num_experts
        weight = torch.zeros(rows, hidden_size, dtype=torch.float32)
        self.weight = nn.Parameter(weight, requires_grad=False)
        bias = torch.zeros(num_experts, dtype=torch.float32)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.weight.weight_loader = self._load_weight  # type: ignore[attr-defined]
        self.bias.weight_loader = self._load_bias  # type: ignore[attr-defined]

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Router logits in float32, [T, E], without the bias."""
        return functional.linear(x_TH.float(), self.weight)[:, : self.num_experts]

    def _load_weight(self, parameter: nn.Parameter, loaded_EH: torch.Tensor) -> None:
        parameter.data.zero_()
        parameter.data[: loaded_EH.shape[0]].copy_(loaded_EH)

    def _load_bias(self, parameter: nn.Parameter, loaded_E: torch.Tensor) -> None:
        """FlexOlmo's negative bias: min(b, 0) (arXiv 2507.07024, section 3.3)."""
        parameter.data.zero_()
        parameter.data[: loaded_E.shape[0]].copy_(loaded_E.clamp(max=0))


class GatedMoE(nn.Module):
    """One layer's router and experts under per-token gates.

    Attributes:
        unit_E: the slot that each expert belongs to, which is the bit that a gate has for it.
    """

    unit_E: torch.Tensor

    def __init__(self, config: Any, gates: GateState, quant_config: Any, layer: int, prefix: str) -> None:
        """``config`` is the checkpoint's FlexOlmoConfig; ``gates`` is shared by all layers."""
        super().__init__()
        self.gates = [gates]  # in a list: the model owns the module
        self.top_k: int = config.num_experts_per_tok
        self.renormalize: bool = config.norm_topk_prob
        self.register_buffer("unit_E", unit_map(gates.table.map.unit_LE[layer]), persistent=False)
        self.num_experts = len(self.unit_E)
        self.gate = RouterRows(self.num_experts, config.hidden_size)
        self.routed_by = gated_topk_implementation(self.unit_E.device)
        # vLLM's CPU kernel knows no expert map: experts dealt out to ranks in turn, and after
        # them as many reserved ones, give every rank exactly one that stays all zero.
        ranks = expert_parallel_ranks()
        reserved = ranks if ranks > 1 else 0
        self.fill: Fill = "none" if reserved else "first"
        self.router = RoutedTopK(self.top_k, self.num_experts + reserved)
        self.experts = FusedMoEFactory(
            num_experts=self.num_experts + reserved,
            top_k=self.top_k,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            renormalize=self.renormalize,
            quant_config=quant_config,
            router=self.router,
            num_expert_group=max(2, ranks),  # vLLM deals out experts of a grouped model only
            routed_experts_cls=chosen_routed_experts(),
            prefix=f"{prefix}.experts",
        )
        if reserved:
            local_of_E = self.experts.routed_experts.expert_map.long()
            zero_slot = int(local_of_E[self.num_experts :].max())
            self.router.place_locally(local_of_E[: self.num_experts], zero_slot)

    @property
    def is_monolithic(self) -> bool:
        """Whether vLLM chose a kernel that routes by itself, past the gate."""
        return bool(self.experts.routed_experts.quant_method.is_monolithic)

    def experts_here(self) -> list[int]:
        """The experts whose weights this rank holds."""
        is_local = self.experts.routed_experts.expert_map_manager.is_local_expert
        return [expert for expert in range(self.num_experts) if is_local(expert)]

    def zero_slot_holds_zeros(self) -> bool:
        """Whether the reserved expert exists and has no weight; trivially so if none is needed."""
        if self.fill == "first":
            return True
        experts = self.experts.routed_experts
        here = len(self.experts_here())
        if self.router.zero_slot != here or experts.local_num_experts != here + 1:
            return False
        return not (experts.w13_weight[here].any() or experts.w2_weight[here].any())

    @property
    def kernels(self) -> tuple[str, str]:
        """(``--moe-kernels`` choice, what computes) that this layer really holds."""
        return held_kernels(self.experts.routed_experts)

    @property
    def pack(self) -> Pack:
        """How one expert lies in this layer's arrays."""
        return pack_of(self.experts.routed_experts)

    def slot_arrays(self) -> SlotArrays:
        """This rank's part of every expert, to write slots into; raises `UnknownLayoutError`."""
        held = self.experts.routed_experts
        parallel = held.moe_config.moe_parallel_config
        return SlotArrays(
            router_EH=self.gate.weight.data,
            bias_E=self.gate.bias.data,
            w13_LGH=held.w13_weight.data,
            w2_LHP=held.w2_weight.data,
            unit_E=bytes(self.unit_E.tolist()),
            local=held._map_global_expert_id_to_local_expert_id,
            pack=self.pack,
            shards=parallel.tp_size,
            shard=parallel.tp_rank,
        )

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Combine the allowed experts' outputs, [T, H]."""
        (gates,) = self.gates
        weights_TK, ids_TK = gated_topk(
            self.gate(x_TH),
            gates.gate_T[: x_TH.shape[0]],
            unit_E=self.unit_E,
            top_k=self.top_k,
            renormalize=self.renormalize,
            bias_E=self.gate.bias,
            mass_TU=gates.mass_TU,
            chosen_T=gates.chosen_T,
            fill=self.fill,
        )
        routed_T2K = torch.cat((weights_TK, ids_TK.to(weights_TK.dtype)), dim=1)
        output: torch.Tensor = self.experts(hidden_states=x_TH, router_logits=routed_T2K)
        return output


def expert_parallel_ranks() -> int:
    """How many ranks share out the experts; 1 without expert parallelism."""
    parallel = get_current_vllm_config().parallel_config
    return parallel.tensor_parallel_size if parallel.enable_expert_parallel else 1
