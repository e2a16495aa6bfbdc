"""Propose a set of units for a task: the one under whose gate examples of the task are likeliest.

Units are chosen one after another: each time the one that lowers the loss on one half of the examples most. How many
are worth having is judged on the other half, which none was chosen by. What every request uses is in the set from the
start.

Shapes: B sequences, E experts of a layer, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import torch

from flexgate.experts.checkpoint.layout import CONFIG_NAME, Architecture
from flexgate.experts.checkpoint.ownership import OWNERSHIP_NAME, Ownership, parse_ownership, unnamed
from flexgate.experts.checkpoint.reader import read_checkpoint, read_json
from flexgate.experts.errors import EvaluationRefused
from flexgate.experts.evaluation.measure import nats_per_token
from flexgate.experts.evaluation.predict import Predict
from flexgate.experts.training.batches import Example
from flexgate.experts.training.encoding import Encoder
from flexgate.experts.training.model import FlexOlmo
from flexgate.experts.training.texts import Document, read_file


@dataclass(frozen=True)
class Step:
    """A set of units, with the mean loss per token (nats) on the examples it was chosen by and on the others."""

    units: tuple[str, ...]
    nats: float
    held_out_nats: float


def find_set(
    directory: Path,
    examples: Path,
    *,
    most: int,
    length: int,
    seed: int,
    progress: Callable[[int], None] = lambda _count: None,
) -> list[Step]:
    """The sets that were tried as best of their size, from the smallest on.

    Args:
        most: units to add at most.
        length: longest piece of an example, in tokens.
        seed: of the split of the examples.
        progress: called after each set that was measured.

    Raises:
        LayoutError: ``directory`` is no checkpoint.
        TextsInvalid: examples that cannot be read.
        EvaluationRefused: fewer than two examples, or no set has an expert in every layer.
    """
    architecture, tensors = read_checkpoint(directory)
    ownership = read_ownership(directory, architecture)
    encoder = Encoder.from_model(directory, read_json(directory / CONFIG_NAME))
    documents = read_file(examples)
    if len(documents) < 2:
        raise EvaluationRefused(f"{examples} holds one example; two or more are needed, to choose by and to judge by")
    chosen_by, judged_by = _halves(documents, encoder, min(length, architecture.max_position_embeddings), seed)
    model = FlexOlmo.from_tensors(architecture, tensors)

    def losses(units: frozenset[int]) -> tuple[float, float]:
        predict = gated_units(model, ownership, units)
        progress(1)
        return tuple(nats_per_token(predict, half, encoder.pad_id) for half in (chosen_by, judged_by))  # type: ignore[return-value]

    return _forward(ownership, losses, most)


def best(steps: Sequence[Step]) -> Step:
    """The set of the least loss on the examples that none was chosen by; of equal ones the smallest."""
    return min(steps, key=lambda step: _finite(step.held_out_nats))


def gated_units(model: FlexOlmo, ownership: Ownership, units: frozenset[int]) -> Predict:
    """``model`` with the experts of these units only, whatever layer they are in."""
    allowed_LE = torch.tensor([[unit in units for unit in unit_E] for unit_E in ownership.unit_LE])

    @torch.no_grad()
    def predict(tokens_BT: torch.Tensor) -> torch.Tensor:
        return model(tokens_BT, allowed_LE[:, None].expand(-1, len(tokens_BT), -1)).log_softmax(-1)

    return predict


def read_ownership(directory: Path, architecture: Architecture) -> Ownership:
    """Whose the experts of a checkpoint are, as far as it says."""
    experts_L = (architecture.num_experts,) * architecture.num_hidden_layers
    path = directory / OWNERSHIP_NAME
    return parse_ownership(read_json(path), experts_L, str(path)) if path.is_file() else unnamed(experts_L)


def _forward(ownership: Ownership, losses: Callable[[frozenset[int]], tuple[float, float]], most: int) -> list[Step]:
    units = ownership.units
    first = present = frozenset(number for number, unit in enumerate(units) if number == 0 or unit.required)
    steps: list[Step] = []
    losses = cache(losses)  # the set that is chosen was measured with the others of its size
    while True:
        if not _empty_layers(ownership, present):
            nats, held_out = losses(present)
            steps.append(Step(tuple(units[number].id for number in sorted(present)), nats, held_out))
        rest = [number for number in range(len(units)) if number not in present]
        if not rest or len(present) - len(first) >= most:
            break
        present |= {min(rest, key=lambda number: _rank(ownership, losses, present | {number}))}
    if not steps:
        raise EvaluationRefused(f"no set of {most} units has an expert in every layer: allow more")
    return steps


def _rank(
    ownership: Ownership, losses: Callable[[frozenset[int]], tuple[float, float]], units: frozenset[int]
) -> tuple[int, float]:
    """Sets that leave fewer layers without an expert come first, and among those that leave none the likeliest."""
    empty = _empty_layers(ownership, units)
    return (empty, math.inf) if empty else (0, _finite(losses(units)[0]))


def _finite(nats: float) -> float:
    """A loss to compare by: one that is no number is the worst."""
    return nats if math.isfinite(nats) else math.inf


def _empty_layers(ownership: Ownership, units: frozenset[int]) -> int:
    return sum(units.isdisjoint(unit_E) for unit_E in ownership.unit_LE if unit_E)


def _halves(documents: list[Document], encoder: Encoder, length: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Whole documents, so that no half has seen a part of what the other has."""
    shuffled = Random(seed).sample(documents, len(documents))
    middle = len(shuffled) // 2
    return encoder.encode(shuffled[:middle], length), encoder.encode(shuffled[middle:], length)
