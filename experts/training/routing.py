"""Router rows from data: a linear discriminant of an owner's text against public text.

The paper starts a row from the mean embedding of the owner's domain and trains it with the language-model loss. In
small models that loss teaches the row to take public text too, so here the row is fitted by own-vs-public
classification alone, on the frozen anchor's hidden states. The public row is zero, so a row's logit is the log-odds of
*own* against *public*.

**Routing channels.** Owners leave the FFNs below the first *expert layer* public: up to that layer's router, hidden
states are the same under every gate. Above it they are not, so a part of the residual stream is reserved: channel 0
always holds 1 (a row's weight there is its bias, the paper's negative bias, folded in), and nothing above the first
expert layer's attention writes to channels 1..C. The anchor is trained so that a prompt's key words can be read from
them wherever it answers. While an expert trains, rows of later layers read the channels alone; fitted once more on the
trained pair, they also see what the owner's expert wrote below them, which tells own text more surely.

Shapes: B sequences, T positions, N chosen positions, L layers, C routing channels + 1, H hidden, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexgate.experts.training.batches import Batch
from flexgate.experts.training.model import FlexOlmo

NEWTON_STEPS: Final = 30
BIAS_PENALTY: Final = 1e-9
"""Keeps the Hessian regular; too small to move the bias."""


@dataclass(frozen=True)
class Samples:
    """Router inputs of every layer at weighted positions."""

    inputs_LNH: tuple[Tensor, ...]
    weights_N: Tensor


@torch.no_grad()
def reserve_channels(model: FlexOlmo, channels: int, first_expert_layer: int) -> None:
    """Project the parameters back to the contract of the routing channels; called after every anchor step."""
    model.model.embed_tokens.weight[:, 0] = 1.0
    for number, layer in enumerate(model.model.blocks):
        attention, feed = layer.post_attention_layernorm.weight, layer.post_feedforward_layernorm.weight
        attention[: channels + 1 if number > first_expert_layer else 1] = 0.0
        feed[: channels + 1 if number >= first_expert_layer else 1] = 0.0


def key_loss(head: nn.Linear, tap_BTH: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of a prompt's key tokens, read by ``head`` from the channels wherever the model answers."""
    counts_BV = torch.zeros(len(batch.tokens_BT), head.out_features)
    counts_BV.scatter_add_(1, batch.tokens_BT, batch.keys_BT.float())
    present_BV = (counts_BV > 0).float()
    answering_BT = (batch.weights_BT == 1.0) & batch.keys_BT.any(1, keepdim=True)
    target_NV = (present_BV / present_BV.sum(1, keepdim=True).clamp(min=1))[answering_BT.nonzero()[:, 0]]
    return F.cross_entropy(head(tap_BTH[answering_BT][:, 1 : head.in_features + 1]), target_NV)


@torch.no_grad()
def collect(anchor: FlexOlmo, batches: Iterable[Batch]) -> Samples:
    """What the anchor's routers see on ``batches``, with the batches' loss weights."""
    inputs: list[list[Tensor]] = [[] for _ in anchor.model.blocks]
    weights = []
    for batch in batches:
        taps: list[Tensor] = []
        anchor.hidden(batch.tokens_BT, taps=taps)
        used = batch.weights_BT > 0
        weights.append(batch.weights_BT[used])
        for seen, tap in zip(inputs, taps, strict=True):
            seen.append(tap[used].cpu())
    return Samples(tuple(torch.cat(seen) for seen in inputs), torch.cat(weights))


def fit_rows(
    own: Samples, other: Samples, *, channels: int, first_expert_layer: int, layers: Iterable[int], decay: float
) -> dict[int, Tensor]:
    """One row per layer: ``[H]`` up to the first expert layer, ``[C]`` above it."""
    rows = {}
    for layer in layers:
        own_NH, other_NH = own.inputs_LNH[layer], other.inputs_LNH[layer]
        width = own_NH.shape[1] if layer <= first_expert_layer else channels + 1
        rows[layer] = fit_row(own_NH[:, :width], own.weights_N, other_NH[:, :width], other.weights_N, decay=decay)
    return rows


def fit_row(own_ND: Tensor, own_N: Tensor, other_ND: Tensor, other_N: Tensor, *, decay: float) -> Tensor:
    """Weighted logistic regression ``[D]`` with an L2 penalty on all but the bias, by Newton's method.

    ``own_N`` and ``other_N`` are weights; both sides weigh the same. Convex, so nothing is random.
    """
    x = torch.cat((own_ND, other_ND)).double()
    y = torch.cat((torch.ones(len(own_ND)), torch.zeros(len(other_ND)))).double()
    weights = torch.cat((own_N / own_N.sum(), other_N / other_N.sum())).double() / 2
    penalty = torch.full((x.shape[1],), 2 * decay, dtype=torch.float64)
    penalty[0] = BIAS_PENALTY
    row = torch.zeros_like(penalty)
    for _ in range(NEWTON_STEPS):
        p = (x @ row).sigmoid()
        gradient = x.T @ (weights * (p - y)) + penalty * row
        hessian = (x.T * (weights * p * (1 - p))) @ x + torch.diag(penalty)
        step = torch.linalg.solve(hessian, gradient)
        row = row - step
        if step.norm() < 1e-6:
            break
    return row.float()


@torch.no_grad()
def set_rows(pair: FlexOlmo, rows: Mapping[int, Tensor], *, sharpness: float) -> None:
    """Write expert 1's router rows; ``sharpness`` scales the logits so that the softmax is nearly one-hot."""
    for layer, row in rows.items():
        pair.model.blocks[layer].mlp.gate.weight[1, : len(row)] = sharpness * row
