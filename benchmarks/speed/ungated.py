"""The served models with the gate left out: what gating is measured against, and nothing else.

Same attention, same experts, same router arithmetic in float32; the routing is vLLM's own softmax and
top-k, no slot is spare, and vLLM's own worker and scheduler run it: no hooks, no seal, no attribution.
Nothing of the shipped packages can reach it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from vllm import ModelRegistry
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.v1.worker.cpu_worker import CPUWorker

from flexgate.server.engine.seam.models import MODELS, build_model


class PlainRouter(nn.Module):
    """Router rows in float32, as many as there are experts, every one open to every token."""

    def __init__(self, hidden_size: int, num_experts: int, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size, dtype=torch.float32), requires_grad=False)

    def forward(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, None]:
        return functional.linear(x_TH.float(), self.weight), None


class UngatedModel(nn.Module):
    """An architecture's class around :class:`PlainRouter`, as the shipped `GatedModel` is around its own."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        (architecture,) = self.config.architectures
        self.model = build_model(architecture, PlainRouter, FusedMoEFactory, vllm_config=vllm_config, prefix=prefix)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.model.embed_input_ids(input_ids)
        return embedded

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden: torch.Tensor = self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        return hidden

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits: torch.Tensor | None = self.model.compute_logits(hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return {f"model.{name}" for name in self.model.load_weights(weights)}


class PlainWorker(CPUWorker):
    """vLLM's worker; importing this module makes its process know the ungated models."""


for architecture in MODELS:
    ModelRegistry.register_model(architecture, UngatedModel)
