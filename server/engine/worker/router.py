"""A layer's gated router, and what takes the place of vLLM's in the runner of its experts.

Legend: T tokens, E experts of the layer, P the same padded, K chosen experts, H hidden size.

:class:`GatedRouter` takes the place of the linear layer that a model routes with. What it gives is already routed:
weights and ids, side by side in the tensor that vLLM passes along as router logits, and an excluded slot's id is never
among them. So the gate is applied here and not in vLLM's router, which under data or expert parallelism sees tokens
gathered from other ranks; :class:`RoutedTopK`, which takes that router's place, only unpacks.
"""

import torch
from torch import nn
from torch.nn import functional

from flexgate.experts.checkpoint.families import Routing
from flexgate.kernels.gated_scores import gated_scores
from flexgate.kernels.gated_topk import Fill, gated_topk, gated_topk_implementation, unit_map
from flexgate.server.engine.seam.engine import BaseRouter, RoutingMethodType
from flexgate.server.engine.worker.gate_buffers import GateState

ROUTER_ROWS = 16  # router rows are padded to a multiple, so that a dot product never
# changes its vectorisation, and so its last bit, with the number of experts


class NotRoutedError(RuntimeError):
    """Experts were given something else than a gate's picks."""


def pack_picks(weights_TK: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """Both as int32 [T, 2K], weights by their bits: no router logits are whole numbers, so that none pass for picks."""
    return torch.cat((weights_TK.view(torch.int32), ids_TK), dim=1)


def unpack_picks(packed: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (float32) and ids (int32), each [T, K].

    Raises:
        NotRoutedError: no gate has made this: a layer passes its logits on.
    """
    if packed.dtype is not torch.int32 or packed.shape[1] != 2 * top_k:
        raise NotRoutedError(
            f"experts were given {packed.dtype} [tokens, {packed.shape[1]}] to choose by, "
            f"expected what their gate has chosen: int32 [tokens, {2 * top_k}]"
        )
    bits_TK, ids_TK = packed.split(top_k, dim=1)
    return bits_TK.view(torch.float32), ids_TK


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
        weights_TK, ids_TK = unpack_picks(router_logits, self.top_k)
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
    e_score_correction_bias: nn.Parameter  # of sigmoid routers, whose model's class sets it

    def __init__(
        self, gates: GateState, routing: Routing, layer: int, hidden_size: int, top_k: int, fill: Fill
    ) -> None:
        """All rows and biases start at zero; ``gates`` is shared by all layers."""
        super().__init__()
        self.gates = [gates]  # in a list: the model owns the module
        self.routing, self.renormalize, self.top_k, self.fill = routing, bool(routing.renormalize), top_k, fill
        self.register_buffer("unit_E", unit_map(gates.table.map.unit_LE[layer]), persistent=False)
        self.num_experts = len(self.unit_E)
        rows = -(-self.num_experts // ROUTER_ROWS) * ROUTER_ROWS
        weight = torch.zeros(rows, hidden_size, dtype=torch.float32)
        self.weight = nn.Parameter(weight, requires_grad=False)
        bias = torch.zeros(self.num_experts, dtype=torch.float32)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.weight.weight_loader = self._load_weight  # type: ignore[attr-defined]
        self.bias.weight_loader = self._load_bias  # type: ignore[attr-defined]
        softmax = routing.scoring == "softmax"
        self.routed_by = gated_topk_implementation(self.unit_E.device) if softmax else "torch operations"

    @property
    def offset_E(self) -> nn.Parameter:
        """What is added to each expert's logit, or to the score that a sigmoid router chooses by."""
        return self.bias if self.routing.scoring == "softmax" else self.e_score_correction_bias

    def forward(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Weights and ids in one tensor, and as vLLM's linear layers no bias to be added later."""
        logits_TP = functional.linear(x_TH.float(), self.weight)
        route = self._by_probability if self.routing.scoring == "softmax" else self._by_score
        return pack_picks(*route(logits_TP)), None

    def _by_probability(self, logits_TP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (gates,) = self.gates
        return gated_topk(
            logits_TP[:, : self.num_experts],
            gates.gate_T[: logits_TP.shape[0]],
            unit_E=self.unit_E,
            top_k=self.top_k,
            renormalize=self.renormalize,
            bias_E=self.bias,
            mass_TU=gates.mass_TU,
            chosen_T=gates.chosen_T,
            fill=self.fill,
        )

    def _by_score(self, logits_TP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (gates,), routing = self.gates, self.routing
        return gated_scores(
            logits_TP,
            gates.gate_T[: logits_TP.shape[0]],
            unit_E=self.unit_E,
            top_k=self.top_k,
            renormalize=self.renormalize,
            correction_E=self.offset_E,
            groups=routing.groups,
            open_groups=routing.open_groups,
            scale=routing.scale,
            mass_TU=gates.mass_TU,
            chosen_T=gates.chosen_T,
            fill=self.fill,
        )

    def _load_weight(self, parameter: nn.Parameter, loaded_EH: torch.Tensor) -> None:
        parameter.data.zero_()
        parameter.data[: loaded_EH.shape[0]].copy_(loaded_EH)

    def _load_bias(self, parameter: nn.Parameter, loaded_E: torch.Tensor) -> None:
        parameter.data.zero_()
        parameter.data[: loaded_E.shape[0]].copy_(loaded_E.clamp(max=0))
