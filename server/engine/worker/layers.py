"""A layer's gated router and experts, as the handshake and the writer of slots see them."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flexgate.server.engine.worker.kernels import computed_with, held_kernels, pack_of
from flexgate.server.engine.worker.slot_arrays import Pack, SlotArrays

if TYPE_CHECKING:
    from flexgate.server.engine.worker.router import GatedRouter, RoutedTopK


@dataclass(frozen=True, slots=True)
class GatedLayer:
    """What one MoE layer is made of on this rank.

    Attributes:
        name: the layer's name in vLLM.
        gate: router rows, and the gate.
        router: what vLLM's runner asks for routing.
        experts: vLLM's runner.
    """

    name: str
    gate: "GatedRouter"
    router: "RoutedTopK"
    experts: Any

    @property
    def unit_E(self) -> torch.Tensor:
        """The slot that each expert belongs to, which is the bit that a gate has for it."""
        return self.gate.unit_E

    @property
    def routed_by(self) -> str:
        """What computes the routing."""
        return self.gate.routed_by

    @property
    def is_monolithic(self) -> bool:
        """Whether vLLM chose a kernel that routes by itself, past the gate."""
        return bool(self.experts.routed_experts.quant_method.is_monolithic)

    @property
    def routing(self) -> list[Any]:
        """How many experts a token gets, and what the router does with their weights."""
        return [self.gate.top_k, *self.gate.routing.facts]

    def is_routed_by_the_gate(self, model: nn.Module) -> bool:
        """Whether the model's block calls this gate and these experts, and these take their routing from the gate.

        Some runners call the gate themselves; of the others, the block does, and hands them the result.
        """
        block = dict(model.named_modules()).get(self.name.rpartition(".")[0])
        return (
            self.experts.router is self.router
            and (self.experts.gate is None or self.experts.gate is self.gate)
            and getattr(block, "gate", None) is self.gate
            and getattr(block, "experts", None) is self.experts
        )

    def experts_here(self) -> list[int]:
        """The experts whose weights this rank holds."""
        is_local = self.experts.routed_experts.expert_map_manager.is_local_expert
        return [expert for expert in range(self.gate.num_experts) if is_local(expert)]

    def zero_slot_holds_zeros(self) -> bool:
        """Whether the reserved expert exists and has no weight; trivially so if none is needed."""
        if self.gate.fill == "first":
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

    @property
    def factors(self) -> list[tuple[torch.Tensor, ...]]:
        """The factors that the kernel computes each low-rank expert with, in their order; see `LowRankExperts`."""
        groups = computed_with(self.experts.routed_experts)
        return [one for group in groups for one in zip(*group.tensors, strict=True)]

    @property
    def low_ranks(self) -> list[int]:
        """The ranks of the experts that this layer computes after the full ones."""
        return [down_HR.shape[1] for *_, down_HR in self.factors]

    def slot_arrays(self) -> SlotArrays:
        """This rank's part of every expert, to write slots into; raises `UnknownLayoutError`."""
        held = self.experts.routed_experts
        parallel = held.moe_config.moe_parallel_config
        return SlotArrays(
            router_EH=self.gate.weight.data,
            bias_E=self.gate.offset_E.data,
            w13_LGH=held.w13_weight.data,
            w2_LHP=held.w2_weight.data,
            unit_E=bytes(self.unit_E.tolist()),
            local=held._map_global_expert_id_to_local_expert_id,
            pack=self.pack,
            factors=self.factors,
            shards=parallel.tp_size,
            shard=parallel.tp_rank,
        )

    def empty(self) -> None:
        """Zero every expert, before any is loaded."""
        for parameter in self.experts.routed_experts.parameters():
            parameter.data.zero_()

    def clear_rows(self, live: Collection[int]) -> None:
        """Zero the router rows of experts whose slots are not ``live``."""
        for expert, unit in enumerate(self.unit_E.tolist()):
            if unit not in live:
                self.gate.weight.data[expert].zero_()
                self.gate.offset_E.data[expert].zero_()
