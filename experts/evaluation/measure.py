"""Figures of one way to predict, per domain: loss on held-out text, exact answers, and where a router sends tokens.

Loss counts the tokens after a prompt (all tokens of plain text), in nats; its exponential is the perplexity. An answer
is right if greedy decoding says exactly its tokens and then ends.

Shapes: B sequences, T positions, N tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from flexgate.experts.evaluation.predict import Predict
from flexgate.experts.training.batches import Batch, Example, batches
from flexgate.experts.training.decode import says
from flexgate.experts.training.model import FlexOlmo

TOKENS: Final = 4096
"""Tokens in a batch: bounds memory, changes no figure."""


@dataclass(frozen=True)
class DomainTexts:
    """What one domain is measured on; the part after ``start`` is what should be said."""

    held_out: Sequence[Example]
    probes: Sequence[Example]


@dataclass(frozen=True)
class Figures:
    """``accuracy`` is None without probes."""

    nats: float
    accuracy: float | None


def measure(predict: Predict, domains: Mapping[str, DomainTexts], pad_id: int) -> dict[str, Figures]:
    """The figures of every domain."""
    return {
        name: Figures(nats_per_token(predict, texts.held_out, pad_id), accuracy(predict, texts.probes))
        for name, texts in domains.items()
    }


@torch.no_grad()
def nats_per_token(predict: Predict, examples: Sequence[Example], pad_id: int) -> float:
    """Mean negative log-likelihood of what should be said."""
    total, count = 0.0, 0
    for batch in _batches(examples, pad_id):
        used_BT = batch.weights_BT > 0
        said_NV = predict(batch.tokens_BT)[used_BT]
        total -= said_NV.gather(-1, batch.tokens_BT.roll(-1, 1)[used_BT][:, None]).double().sum().item()
        count += batch.token_count
    return total / count


def accuracy(predict: Predict, probes: Sequence[Example]) -> float | None:
    """Share of exact answers."""
    if not probes:
        return None
    prompts = [probe.ids[: probe.start] for probe in probes]
    right = says(predict, prompts, [probe.ids[probe.start :] for probe in probes])
    return sum(right) / len(right)


@torch.no_grad()
def routing_accuracy(model: FlexOlmo, expert: int, own: Sequence[Example], pad_id: int) -> list[float]:
    """Per layer, the share of the tokens of ``expert``'s own text that give it the greatest weight."""
    right_L, count = torch.zeros(model.architecture.num_hidden_layers, dtype=torch.long), 0
    for batch in _batches(own, pad_id):
        right_L += _routed_to(model, expert, batch)
        count += batch.token_count
    return (right_L / count).tolist()


@torch.no_grad()
def choice_accuracy(choose: Callable[[torch.Tensor], torch.Tensor], own: int, examples: Sequence[Example]) -> float:
    """The share of ``examples`` that are given to the domain ``own`` when their answer begins.

    ``choose`` takes tokens ``[B, T]`` to a domain after each of them.
    """
    right = 0
    for example in examples:
        tokens_1T = torch.tensor([example.ids[: max(example.start, 1)]])
        right += int(choose(tokens_1T)[0, -1] == own)
    return right / len(examples)


def _routed_to(model: FlexOlmo, expert: int, batch: Batch) -> torch.Tensor:
    taps: list[torch.Tensor] = []
    model.hidden(batch.tokens_BT, taps=taps)
    used = batch.weights_BT > 0
    routers = (block.mlp.gate for block in model.model.blocks)
    return torch.stack(
        [(router(tap[used], None).argmax(-1) == expert).sum() for router, tap in zip(routers, taps, strict=True)]
    )


def _batches(examples: Sequence[Example], pad_id: int) -> Iterator[Batch]:
    return batches(examples, tokens_per_batch=TOKENS, pad_id=pad_id, prompt_weight=0.0, seed=0)
