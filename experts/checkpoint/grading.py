"""What excluding an expert excludes, found out by comparing a model with its siblings.

Siblings are checkpoints that the model was made of or beside: its anchor, the owners' own ones, other merges. If all of
the model but the expert itself lies, in the same bits, in siblings that lack the expert, then nothing else has learnt
from its data, as far as these siblings have not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexgate.experts.checkpoint.base import BaseIdentity, identity_of
from flexgate.experts.checkpoint.layout import bias_keys, expert_keys, router_keys
from flexgate.experts.checkpoint.ownership import Grade
from flexgate.experts.checkpoint.reader import CheckpointReader
from flexgate.experts.errors import LayoutError
from flexgate.experts.io.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Digests of a checkpoint's parts: what all experts share, each expert's FFN, and each expert's router rows."""

    base: BaseIdentity
    experts: tuple[str, ...]
    rows: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """The grade of one expert, and what it was found by, in words."""

    grade: Grade
    because: str


def fingerprint(directory: Path, progress: Progress = silent) -> Fingerprint:
    """Read every byte of a checkpoint once; raises ``LayoutError``."""
    with CheckpointReader(directory) as checkpoint:
        experts = range(checkpoint.architecture.num_experts)
        base = identity_of(checkpoint, progress)
        ffns = tuple(_ffn(checkpoint, expert, progress) for expert in experts)
        return Fingerprint(base, ffns, tuple(_rows(checkpoint, expert) for expert in experts))


def grade(model: Fingerprint, siblings: Mapping[str, Fingerprint], expert: int) -> Finding:
    """The grade of an expert of ``model``.

    Args:
        siblings: by the names that messages call them.

    Raises:
        LayoutError: a sibling has other sizes or another dtype, and is none.
    """
    for name, sibling in siblings.items():
        _require_sibling(name, model.base, sibling.base)
    without = {name: sibling for name, sibling in siblings.items() if model.experts[expert] not in sibling.experts}
    if not without:
        return Finding("unknown", "every checkpoint given has the expert: give one without it, such as the anchor")
    differences = {name: model.base.difference(sibling.base) for name, sibling in without.items()}
    if None not in differences.values():
        name, difference = next(iter(differences.items()))
        return Finding("shared", f"{difference}, in {name}")
    return _by_others(model, without, expert)


def _by_others(model: Fingerprint, without: Mapping[str, Fingerprint], expert: int) -> Finding:
    """By the experts that stay when one is excluded, where the shared weights are older than it."""
    ffns = {ffn for sibling in without.values() for ffn in sibling.experts}
    pairs = {pair for sibling in without.values() for pair in zip(sibling.experts, sibling.rows, strict=True)}
    others = [index for index in range(1, len(model.experts)) if index != expert]
    for index in others:
        if model.experts[index] not in ffns:
            return Finding("unknown", f"no checkpoint given has expert {index} and lacks this one: give its owner's")
    for index in others:
        if (model.experts[index], model.rows[index]) not in pairs:
            return Finding("router", f"the router rows of expert {index} are other ones than without this expert")
    return Finding("removed", f"all else is as in {', '.join(without)}")


def _require_sibling(name: str, mine: BaseIdentity, its: BaseIdentity) -> None:
    if mine.architecture != its.architecture or mine.dtype != its.dtype:
        raise LayoutError(f"{name} is not a sibling of the model: {mine.difference(its)}")


def _ffn(checkpoint: CheckpointReader, expert: int, progress: Progress) -> str:
    digest = hashlib.sha256()
    for key in expert_keys(checkpoint.architecture, expert):
        for chunk in checkpoint.chunks(key):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def _rows(checkpoint: CheckpointReader, expert: int) -> str:
    """The digest of an expert's router rows; a bias of zero counts as absent, because merging adds it."""
    digest = hashlib.sha256(_bytes(checkpoint, router_keys(checkpoint.architecture), expert))
    biases = _bytes(checkpoint, [key for key in bias_keys(checkpoint.architecture) if key in checkpoint], expert)
    if any(biases):
        digest.update(biases)
    return digest.hexdigest()


def _bytes(checkpoint: CheckpointReader, keys: Sequence[str], row: int) -> bytes:
    return b"".join(bytes(chunk) for key in keys for chunk in checkpoint.chunks(key, row, 1))
