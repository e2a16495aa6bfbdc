"""Random layers and batches to compute, and their exact answers.

Shape suffixes: T tokens, E expert slots, K chosen experts, H hidden, F expert intermediate, G = 2F, R sampled tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from flexgate.kernels.bench.place import Place
from flexgate.kernels.testing.configurations import Shape


@dataclass(frozen=True)
class Weights:
    """One layer's experts."""

    shape: Shape
    w13_EGH: Tensor
    w2_EHF: Tensor

    def without(self, slots: Sequence[int]) -> "Weights":
        """The same layer with these slots full of NaN."""
        w13_EGH, w2_EHF = self.w13_EGH.clone(), self.w2_EHF.clone()
        w13_EGH[list(slots)] = w2_EHF[list(slots)] = float("nan")
        return replace(self, w13_EGH=w13_EGH, w2_EHF=w2_EHF)

    def compacted(self, kept: Sequence[int]) -> "Weights":
        """The same layer with these slots alone, moved together."""
        shape = replace(self.shape, slots=len(kept))
        return Weights(shape, self.w13_EGH[list(kept)].contiguous(), self.w2_EHF[list(kept)].contiguous())


@dataclass(frozen=True)
class Batch:
    """Tokens on their way into a layer, routed."""

    x_TH: Tensor
    logits_TE: Tensor
    weights_TK: Tensor
    ids_TK: Tensor

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.x_TH)

    def used(self) -> list[int]:
        """Slots that somebody chose; reads from the device."""
        return sorted(set(self.ids_TK.unique().tolist()) - {-1})

    def picks(self) -> int:
        """Choices that are real; reads from the device."""
        return int((self.ids_TK >= 0).sum())

    def rows(self, tokens: Sequence[int]) -> "Batch":
        """Only these tokens, in this order."""
        chosen = (part[list(tokens)].contiguous() for part in (self.x_TH, self.logits_TE, self.weights_TK, self.ids_TK))
        return Batch(*chosen)


def random_weights(place: Place, shape: Shape, seed: int = 0) -> Weights:
    """Entries scaled so that products stay near 1."""
    generator = torch.Generator(place.device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        drawn = torch.empty(size, dtype=torch.bfloat16, device=place.device)
        return drawn.normal_(std=size[-1] ** -0.5, generator=generator)

    w13_EGH = normal(shape.slots, 2 * shape.intermediate, shape.hidden)
    return Weights(shape, w13_EGH, normal(shape.slots, shape.hidden, shape.intermediate))


def random_batch(place: Place, shape: Shape, tokens: int, allowed: Sequence[int], seed: int = 1) -> Batch:
    """Tokens that may all use the same slots."""
    generator = torch.Generator(place.device).manual_seed(seed)
    x_TH = torch.empty(tokens, shape.hidden, dtype=torch.bfloat16, device=place.device).normal_(generator=generator)
    logits_TE = torch.empty(tokens, shape.slots, device=place.device).normal_(generator=generator)
    return routed(place, shape, x_TH, logits_TE, allowed)


def routed(place: Place, shape: Shape, x_TH: Tensor, logits_TE: Tensor, allowed: Sequence[int]) -> Batch:
    """Route by our kernel under one gate for all."""
    gate_T = torch.full((len(x_TH),), sum(1 << slot for slot in allowed), dtype=torch.int64, device=place.device)
    return Batch(x_TH, logits_TE, *place.route(logits_TE, gate_T, shape.top_k))


def exact_rows(layer: Weights, batch: Batch) -> Tensor:
    """The layer's output in float64, nothing rounded on the way, [T, H]."""
    out_TH = torch.zeros_like(batch.x_TH, dtype=torch.float64)
    for slot in batch.used():
        tokens, ranks = (batch.ids_TK == slot).nonzero(as_tuple=True)
        gate_up = linear(batch.x_TH[tokens].double(), layer.w13_EGH[slot].double())
        gate, up = gate_up.chunk(2, dim=1)
        expert = linear(silu(gate) * up, layer.w2_EHF[slot].double())
        out_TH[tokens] += batch.weights_TK[tokens, ranks, None].double() * expert
    return out_TH
