"""Merging concatenates, and refuses parts of another anchor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flexgate.experts.errors import MergeError
from flexgate.experts.layout import Architecture, expected_shapes, expert_keys, router_keys, shared_keys
from flexgate.experts.merge import merge
from flexgate.experts.model import FlexOlmo
from flexgate.experts.train import initialise, pair_from_anchor

ONE = Architecture(31, 16, 12, 2, 2, 2, num_experts=1, num_experts_per_tok=1)

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def parts() -> tuple[Tensors, Tensors, Tensors]:
    """An anchor and two pairs whose second experts and rows are random."""
    anchor = FlexOlmo(ONE)
    initialise(anchor, 1)
    pairs = []
    for seed in (2, 3):
        generator = torch.Generator().manual_seed(seed)
        pair = {key: tensor.clone() for key, tensor in pair_from_anchor(anchor).state_dict().items()}
        for key in expert_keys(ONE, 1):
            pair[key].normal_(generator=generator)
        for key in router_keys(ONE):
            pair[key][1].normal_(generator=generator)
        pairs.append(pair)
    return dict(anchor.state_dict()), pairs[0], pairs[1]


def test_merge_concatenates_experts_and_router_rows(parts: tuple[Tensors, Tensors, Tensors]) -> None:
    anchor, one, two = parts
    architecture, merged = merge(ONE, anchor, [("one", one), ("two", two)], top_k=2)
    assert architecture == replace(ONE, num_experts=3, num_experts_per_tok=2)
    assert {key: tuple(tensor.shape) for key, tensor in merged.items()} == expected_shapes(architecture)
    assert all(torch.equal(merged[key], anchor[key]) for key in (*shared_keys(ONE), *expert_keys(ONE, 0)))
    for index, pair in ((1, one), (2, two)):
        sources = expert_keys(ONE, 1)
        assert all(torch.equal(merged[t], pair[s]) for t, s in zip(expert_keys(ONE, index), sources, strict=True))
        assert all(torch.equal(merged[key][index], pair[key][1]) for key in router_keys(ONE))


def test_merged_model_gated_to_one_owner_equals_the_pair(parts: tuple[Tensors, Tensors, Tensors]) -> None:
    anchor, one, two = parts
    architecture, merged = merge(ONE, anchor, [("one", one), ("two", two)], top_k=2)
    tokens = torch.arange(20).view(2, 10)
    gate = torch.tensor([[True, False, True]]).expand(2, 3)
    pair_architecture = replace(ONE, num_experts=2, num_experts_per_tok=2)
    with torch.no_grad():
        gated = FlexOlmo.from_tensors(architecture, merged)(tokens, gate)
        alone = FlexOlmo.from_tensors(pair_architecture, two)(tokens)
    torch.testing.assert_close(gated, alone, atol=1e-5, rtol=1e-5)


def test_an_untrained_pair_computes_what_the_anchor_computes() -> None:
    anchor = FlexOlmo(ONE)
    initialise(anchor, 5)
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(pair_from_anchor(anchor)(tokens), anchor(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("key", [*shared_keys(ONE), *expert_keys(ONE, 0)])
def test_one_flipped_bit_in_a_shared_tensor_is_refused_by_name(
    key: str, parts: tuple[Tensors, Tensors, Tensors]
) -> None:
    anchor, one, two = parts
    damaged = two[key].clone()
    damaged.view(torch.int32).flatten()[-1] ^= 1
    with pytest.raises(MergeError, match=f"two: shared tensor {key} differs"):
        merge(ONE, anchor, [("one", one), ("two", {**two, key: damaged})], top_k=2)


def test_negative_zero_in_the_public_row_is_refused_by_name(parts: tuple[Tensors, Tensors, Tensors]) -> None:
    anchor, one, _ = parts
    key = router_keys(ONE)[1]
    damaged = one[key].clone()
    damaged[0, 3] = -0.0
    with pytest.raises(MergeError, match=f"one: the public row of {key} differs"):
        merge(ONE, anchor, [("one", {**one, key: damaged})], top_k=2)
