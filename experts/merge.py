"""Merging pairs into one model by concatenation, without joint training (FlexOlmo, section 3.3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flexgate.experts.errors import MergeError
from flexgate.experts.layout import (
    EXPERT_KEYS,
    Architecture,
    check_tensors,
    expert_keys,
    router_keys,
    shared_keys,
)

Tensors = Mapping[str, Tensor]


def merge(
    architecture: Architecture, anchor: Tensors, pairs: Sequence[tuple[str, Tensors]], *, top_k: int
) -> tuple[Architecture, dict[str, Tensor]]:
    """Concatenate the experts and router rows of ``pairs`` (id, two-expert checkpoint) behind the anchor's.

    Raises ``MergeError`` unless everything that a pair shares with the anchor is equal in every bit.
    """
    check_tensors(architecture, anchor)
    for name, pair in pairs:
        check_tensors(replace(architecture, num_experts=2), pair)
        _check_shared(architecture, anchor, name, pair)
    merged_architecture = replace(architecture, num_experts=1 + len(pairs), num_experts_per_tok=top_k)
    merged = {key: anchor[key] for key in (*shared_keys(architecture), *expert_keys(architecture, 0))}
    for key in router_keys(architecture):
        merged[key] = torch.cat([anchor[key][:1], *(pair[key][1:2] for _, pair in pairs)])
    for index, (_, pair) in enumerate(pairs, start=1):
        merged |= {target: pair[source] for source, target in _moves(architecture, index)}
    return merged_architecture, merged


def bit_equal(one: Tensor, other: Tensor) -> bool:
    """Equal dtype, shape and bits: tells 0.0 from -0.0 and NaN from NaN of another payload."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _check_shared(architecture: Architecture, anchor: Tensors, name: str, pair: Tensors) -> None:
    for key in (*shared_keys(architecture), *expert_keys(architecture, 0)):
        if not bit_equal(anchor[key], pair[key]):
            raise MergeError(f"{name}: shared tensor {key} differs from the anchor's")
    for key in router_keys(architecture):
        if not bit_equal(anchor[key][:1], pair[key][:1]):
            raise MergeError(f"{name}: the public row of {key} differs from the anchor's")


def _moves(architecture: Architecture, index: int) -> Iterable[tuple[str, str]]:
    for layer in range(architecture.num_hidden_layers):
        for key in EXPERT_KEYS:
            yield key.format(layer=layer, expert=1), key.format(layer=layer, expert=index)
