"""Router rows from data: a linear discriminant of an owner's text against public text.

The paper starts a row from the mean embedding of the owner's domain and trains it with the language-model loss. In
small models that loss teaches the row to take public text too, so here the row is fitted by own-vs-public
classification alone, on the frozen anchor's hidden states. The public row is zero, so a row's logit is the log-odds
of *own* against *public*.

**Routing channels.** Of the residual stream, channel 0 always holds 1 (a row's weight there is its bias, the
paper's negative bias, folded in), and channels 1..C are written only by the embedding, the first two attentions and
the first FFN. Owners leave the first FFN public, so these channels carry the same values under every gate: adding
or excluding an expert cannot shift another expert's routing.

Shapes: B sequences, T positions, N chosen positions, C routing channels + 1, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexgate.experts.batches import Batch
from flexgate.experts.model import FlexOlmo


@dataclass(frozen=True)
class Samples:
    """Router inputs at weighted positions, for the first layer and for the later ones."""

    first_NC: Tensor
    later_NC: Tensor
    weights_N: Tensor


@torch.no_grad()
def reserve_channels(model: FlexOlmo, channels: int) -> None:
    """Project the parameters back to the contract of the routing channels; called after every anchor step."""
    model.model.embed_tokens.weight[:, 0] = 1.0
    for number, layer in enumerate(model.model.layers):
        attention, feed = layer.post_attention_layernorm.weight, layer.post_feedforward_layernorm.weight
        attention[: channels + 1 if number > 1 else 1] = 0.0
        feed[: channels + 1 if number > 0 else 1] = 0.0


@torch.no_grad()
def collect(anchor: FlexOlmo, batches: Iterable[Batch], channels: int) -> Samples:
    """What the anchor's routers see on ``batches``, with the batches' loss weights."""
    first, later, weights = [], [], []
    for batch in batches:
        taps: list[Tensor] = []
        anchor.hidden(batch.tokens_BT, taps=taps)
        used = batch.weights_BT > 0
        first.append(taps[0][used][:, : channels + 1])
        later.append(taps[1][used][:, : channels + 1])
        weights.append(batch.weights_BT[used])
    return Samples(torch.cat(first), torch.cat(later), torch.cat(weights))


def fit_row(own_NC: Tensor, own_weights: Tensor, other_NC: Tensor, other_weights: Tensor, *, decay: float) -> Tensor:
    """Logistic regression with an L2 penalty, both sides weighing the same; a row ``[C]``. Convex, so no seed."""
    x = torch.cat((own_NC, other_NC))
    y = torch.cat((torch.ones(len(own_NC)), torch.zeros(len(other_NC))))
    weights = torch.cat((own_weights / own_weights.sum(), other_weights / other_weights.sum())) / 2
    row = nn.Parameter(torch.zeros(x.shape[1]))
    optimizer = torch.optim.LBFGS([row], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = F.binary_cross_entropy_with_logits(x @ row, y, reduction="none")
        loss = (losses * weights).sum() + decay * row[1:].square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return row.detach()


@torch.no_grad()
def set_rows(pair: FlexOlmo, first_C: Tensor, later_C: Tensor, *, sharpness: float) -> None:
    """Write expert 1's router rows; ``sharpness`` scales the logits so that the softmax is nearly one-hot."""
    for number, layer in enumerate(pair.model.layers):
        row = first_C if number == 0 else later_C
        layer.mlp.gate.weight[1, : len(row)] = sharpness * row
