"""The native model with the gate compiled out: what gating is measured against, and nothing else.

Same attention, same experts, same router arithmetic in float32; the routing is vLLM's own softmax and
top-k, no slot is spare, and vLLM's own worker and scheduler run it: no hooks, no seal, no attribution.
Nothing of the shipped packages can reach it.
"""

from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional
from vllm import ModelRegistry
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.v1.worker.cpu_worker import CPUWorker

from flexgate.server.engine.worker import model
from flexgate.server.engine.worker.plugin import ARCHITECTURE


class PlainMoE(nn.Module):
    """Router and experts, every expert open to every token."""

    def __init__(self, config: Any, gates: Any, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.gate = PlainRouter(config.num_experts, config.hidden_size)
        self.experts = FusedMoEFactory(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            renormalize=config.norm_topk_prob,
            quant_config=quant_config,
            prefix=f"{prefix}.experts",
        )

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.experts(hidden_states=x_TH, router_logits=self.gate(x_TH))
        return output


class PlainRouter(nn.Module):
    """Router rows in float32, as many as there are experts."""

    def __init__(self, num_experts: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size, dtype=torch.float32), requires_grad=False)

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        return functional.linear(x_TH.float(), self.weight)


class UngatedFlexOlmoForCausalLM(model.GatedFlexOlmoForCausalLM):
    """The shipped model around :class:`PlainMoE`."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        with mock.patch.object(model, "GatedMoE", PlainMoE):
            super().__init__(vllm_config=vllm_config, prefix=prefix)


class PlainWorker(CPUWorker):
    """vLLM's worker; importing this module makes its process know the ungated model."""


ModelRegistry.register_model(ARCHITECTURE, UngatedFlexOlmoForCausalLM)
