"""What every training shares: the learning rate, the loss, a seeded start, the pair of anchor and expert.

Shapes: B sequences, T positions, N positions with a weight, V vocabulary, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from flexgate.experts.checkpoint.layout import EXPERT_KEYS, ROUTER_KEY, shared_keys
from flexgate.experts.training.batches import Batch
from flexgate.experts.training.model import FlexOlmo


@dataclass(frozen=True)
class Schedule:
    """Learning rate: linear warm-up to ``peak``, then half a cosine to a tenth of it over ``steps``."""

    peak: float
    steps: int
    warmup: int = 50

    def at(self, step: int) -> float:
        """The learning rate of one step."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Mean gradient over the processes that train together; nothing to do for one alone."""
    if not distributed.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def language_loss(logits_BTV: Tensor, batch: Batch) -> Tensor:
    """Weighted mean cross-entropy of the next token, in nats."""
    losses = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), batch.tokens_BT[:, 1:].flatten(), reduction="none")
    weights = batch.weights_BT[:, :-1].flatten()
    return (losses * weights).sum() / _total(weights, batch)


def weighted_loss(model: FlexOlmo, hidden_BTH: Tensor, batch: Batch) -> Tensor:
    """``language_loss`` from final hidden states, with logits only where they have a weight."""
    used_BT = batch.weights_BT > 0
    losses_N = F.cross_entropy(
        model.lm_head(hidden_BTH[used_BT]), batch.tokens_BT.roll(-1, 1)[used_BT], reduction="none"
    )
    weights_N = batch.weights_BT[used_BT]
    return (losses_N * weights_N).sum() / _total(weights_N, batch)


def _total(weights: Tensor, batch: Batch) -> Tensor:
    """What the weighted losses of a batch, or of a part of one, are divided by."""
    return weights.sum() if batch.whole is None else batch.whole.weights_BT.sum()


def initialise(model: FlexOlmo, seed: int) -> None:
    """Seeded start: unit-variance projections, embeddings of standard deviation one half."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name.endswith("mlp.gate.weight"):
            continue
        scale = 0.5 if "embed_tokens" in name else parameter.shape[1] ** -0.5
        with torch.no_grad():
            parameter.normal_(0.0, scale, generator=generator)


def pair_from_anchor(anchor: FlexOlmo, *, top_k: int = 2) -> FlexOlmo:
    """A two-expert model whose experts both start as the public one; the owner's router row starts at zero."""
    single = anchor.architecture
    pair = FlexOlmo(replace(single, num_experts=2, num_experts_per_tok=top_k))
    source = anchor.state_dict()
    target = {key: source[key] for key in shared_keys(single)}
    for layer in range(single.num_hidden_layers):
        row = source[ROUTER_KEY.format(layer=layer)]
        target[ROUTER_KEY.format(layer=layer)] = torch.cat((row, torch.zeros_like(row)))
        for key in EXPERT_KEYS:
            for expert in (0, 1):
                target[key.format(layer=layer, expert=expert)] = source[key.format(layer=layer, expert=0)]
    pair.load_state_dict(target)
    return pair
