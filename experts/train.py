"""Training an anchor, and an owner's expert as a pair with the frozen anchor (FlexOlmo, section 3.2).

Shapes: B sequences, T positions, V vocabulary, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from tqdm import tqdm

from flexgate.experts.batches import Batch
from flexgate.experts.layout import EXPERT_KEYS, ROUTER_KEY, Architecture, shared_keys
from flexgate.experts.model import FlexOlmo


class Countable(Protocol):
    """What ``fit`` goes through: anything with a number of predictions."""

    @property
    def token_count(self) -> int:
        """Predictions with a weight."""
        ...


Item = TypeVar("Item", bound=Countable)


@dataclass(frozen=True)
class Started:
    """A batch with what the router of the lowest trained layer sees of it."""

    batch: Batch
    seen_BTH: Tensor

    @property
    def token_count(self) -> int:
        """The batch's."""
        return self.batch.token_count


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


def fit(
    parameters: Sequence[nn.Parameter],
    batches: Iterable[Item],
    loss_of: Callable[[Item], Tensor],
    schedule: Schedule,
    *,
    name: str,
    after_step: Callable[[], None] = lambda: None,
    progress: int = 0,
) -> float:
    """Adam without weight decay over ``batches``; returns the smoothed loss, shown with tokens/s."""
    optimizer = torch.optim.Adam(parameters, lr=schedule.peak, betas=(0.9, 0.98))
    smoothed = float("nan")
    with tqdm(total=schedule.steps, desc=name, position=progress, mininterval=2.0) as bar:
        seen = 0
        for step, batch in zip(range(schedule.steps), batches, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = schedule.at(step)
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(batch)
            loss.backward()
            average_gradients(parameters)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            after_step()
            smoothed = loss.item() if step == 0 else 0.98 * smoothed + 0.02 * loss.item()
            seen += batch.token_count
            rate = seen / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"loss {smoothed:.3f}, {rate:,.0f} tokens/s", refresh=False)
            bar.update()
    return smoothed


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
    return (losses * weights).sum() / weights.sum()


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
    pair = FlexOlmo(Architecture(**{**vars(single), "num_experts": 2, "num_experts_per_tok": top_k}))
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


def train_expert(
    pair: FlexOlmo,
    batches: Sequence[Batch],
    schedule: Schedule,
    *,
    name: str,
    layers: Sequence[int],
    seed: int,
    progress: int = 0,
) -> float:
    """Train only expert 1's FFN in ``layers``; all else is out of the graph and the optimizer, so truly frozen.

    What lies below the lowest of ``layers`` is frozen as well, so it is computed once and kept in memory.
    """
    pair.requires_grad_(False)
    started = [Started(batch, _seen_by(pair, min(layers), batch)) for batch in batches]
    parameters = [parameter for layer in layers for parameter in pair.model.blocks[layer].mlp.ffns[1].parameters()]
    for parameter in parameters:
        parameter.requires_grad_()
    return fit(
        parameters,
        shuffled(started, seed),
        lambda item: _loss_from(pair, min(layers), item),
        schedule,
        name=name,
        progress=progress,
    )


def shuffled(items: Sequence[Item], seed: int) -> Iterator[Item]:
    """All items again and again, in another order each time."""
    rng = Random(seed)
    while True:
        yield from rng.sample(items, len(items))


def _seen_by(pair: FlexOlmo, layer: int, batch: Batch) -> Tensor:
    taps: list[Tensor] = []
    with torch.no_grad():
        pair.hidden(batch.tokens_BT, taps=taps)
    return taps[layer].clone()


def _loss_from(pair: FlexOlmo, layer: int, started: Started) -> Tensor:
    """``language_loss`` from ``layer`` on; the head reads only positions with a weight."""
    batch = started.batch
    used = batch.weights_BT > 0
    logits_NV = pair.lm_head(pair.onward(started.seen_BTH, layer)[used])
    losses = F.cross_entropy(logits_NV, batch.tokens_BT.roll(-1, 1)[used], reduction="none")
    weights = batch.weights_BT[used]
    return (losses * weights).sum() / weights.sum()
