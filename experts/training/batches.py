"""From tokenised documents to padded batches of similar length.

Shapes: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """Token ids of one document; from ``start`` on they are what the model should say.

    ``keys`` are the ids among the prompt's that decide what follows, if the caller knows them.
    """

    ids: tuple[int, ...]
    start: int
    keys: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Batch:
    """Right-padded examples.

    ``weights_BT[b, t]`` weighs the prediction of position ``t + 1``; it is zero on padding and at the last position.
    ``keys_BT`` marks the prompt's tokens that decide what follows. Where rows are shared out over processes, ``whole``
    is the batch that these are some rows of: losses divide by what it holds, so that those of the parts add up to its.
    """

    tokens_BT: Tensor
    weights_BT: Tensor
    keys_BT: Tensor
    whole: Batch | None = None

    @property
    def token_count(self) -> int:
        """Predictions with a weight."""
        return int((self.weights_BT > 0).sum())

    def to(self, device: torch.device) -> Batch:
        """On another device; the whole stays where it is."""
        return Batch(self.tokens_BT.to(device), self.weights_BT.to(device), self.keys_BT.to(device), self.whole)


def part_of(batch: Batch, number: int, count: int) -> Batch:
    """Part ``number`` of ``count``: every ``count``-th row.

    A part that no row is left for takes one that weighs nothing, since all processes must compute alike.
    """
    if number < len(batch.tokens_BT):
        own = slice(number, None, count)
        return Batch(batch.tokens_BT[own], batch.weights_BT[own], batch.keys_BT[own], batch)
    return Batch(batch.tokens_BT[:1], torch.zeros_like(batch.weights_BT[:1]), batch.keys_BT[:1], batch)


def make_batch(examples: Sequence[Example], *, pad_id: int, prompt_weight: float) -> Batch:
    """Pad to the longest example."""
    length = max(len(example.ids) for example in examples)
    tokens = torch.full((len(examples), length), pad_id, dtype=torch.long)
    weights = torch.zeros(len(examples), length)
    keys = torch.zeros(len(examples), length, dtype=torch.bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.ids)] = torch.tensor(example.ids)
        weights[row, : len(example.ids) - 1] = prompt_weight
        weights[row, max(example.start - 1, 0) : len(example.ids) - 1] = 1.0
        if example.keys:
            keys[row, : example.start] = torch.tensor([token in example.keys for token in example.ids[: example.start]])
    return Batch(tokens, weights, keys)


def batches(
    examples: Sequence[Example], *, tokens_per_batch: int, pad_id: int, prompt_weight: float, seed: int
) -> Iterator[Batch]:
    """One pass over ``examples`` in random batches of about ``tokens_per_batch``; each batch holds similar lengths."""
    rng = Random(seed)
    order = sorted(examples, key=lambda example: len(example.ids) + rng.random() * 6)
    groups: list[list[Example]] = [[]]
    for example in order:
        if groups[-1] and (len(groups[-1]) + 1) * len(example.ids) > tokens_per_batch:
            groups.append([])
        groups[-1].append(example)
    rng.shuffle(groups)
    for group in groups:
        yield make_batch(group, pad_id=pad_id, prompt_weight=prompt_weight)
