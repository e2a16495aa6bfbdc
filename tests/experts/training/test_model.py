"""The training model computes what transformers' FlexOlmo computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import FlexOlmoForCausalLM

from flexgate.experts.checkpoint.layout import (
    Architecture,
    check_tensors,
    expected_shapes,
    write_checkpoint,
)
from flexgate.experts.checkpoint.reader import read_checkpoint
from flexgate.experts.errors import LayoutError
from flexgate.experts.training.model import FlexOlmo

SHAPES = [
    Architecture(97, 32, 24, 2, 4, 4, num_experts=5, num_experts_per_tok=2),
    Architecture(61, 48, 21, 3, 6, 2, num_experts=6, num_experts_per_tok=6, norm_topk_prob=True),
    Architecture(61, 32, 20, 1, 2, 1, num_experts=1, num_experts_per_tok=1, rope_theta=500000.0),
    Architecture(97, 32, 24, 2, 4, 4, num_experts=5, num_experts_per_tok=2, tie_word_embeddings=True),
]


def random_tensors(architecture: Architecture) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = expected_shapes(architecture)
    return {key: torch.randn(shape, generator=generator) * 0.3 for key, shape in shapes.items()}


@pytest.mark.parametrize("architecture", SHAPES)
@pytest.mark.parametrize("shard_bytes", [None, 8192])
def test_logits_equal_transformers(architecture: Architecture, shard_bytes: int | None, tmp_path: Path) -> None:
    tensors = random_tensors(architecture)
    write_checkpoint(
        tmp_path, architecture, tensors, dtype=torch.float32, eos_token_id=0, pad_token_id=1, shard_bytes=shard_bytes
    )
    read_architecture, read_tensors = read_checkpoint(tmp_path)
    assert read_architecture == architecture
    assert all(torch.equal(read_tensors[key], tensor) for key, tensor in tensors.items())
    reference = FlexOlmoForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    tokens = torch.randint(0, architecture.vocab_size, (3, 11), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours = FlexOlmo.from_tensors(architecture, read_tensors)(tokens)
        theirs = reference(tokens).logits
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("full", [SHAPES[0], SHAPES[-1]], ids=["untied", "tied"])
def test_excluding_an_expert_equals_removing_it(full: Architecture) -> None:
    tensors = random_tensors(full)
    reduced = replace(full, num_experts=4)
    kept: dict[str, torch.Tensor] = {}
    for key in expected_shapes(reduced):
        source = key.replace("experts.3.", "experts.4.").replace("experts.2.", "experts.3.")
        kept[key] = tensors[source]
        if key.endswith("mlp.gate.weight"):
            kept[key] = tensors[key][[0, 1, 3, 4]]
    tokens = torch.arange(24).view(2, 12)
    allowed = torch.tensor([[True, True, False, True, True]]).expand(2, 5)
    with torch.no_grad():
        masked = FlexOlmo.from_tensors(full, tensors)(tokens, allowed)
        removed = FlexOlmo.from_tensors(reduced, kept)(tokens)
    torch.testing.assert_close(masked, removed, atol=1e-5, rtol=1e-4)


def test_missing_extra_and_misshapen_tensors_are_named() -> None:
    architecture = SHAPES[0]
    tensors = random_tensors(architecture)
    with pytest.raises(LayoutError, match=r"lacks 1 tensors, first 'lm_head.weight'"):
        check_tensors(architecture, {key: t for key, t in tensors.items() if key != "lm_head.weight"})
    with pytest.raises(LayoutError, match=r"unknown tensors, first 'stray'"):
        check_tensors(architecture, {**tensors, "stray": torch.zeros(1)})
    with pytest.raises(LayoutError, match=r"lm_head.weight has shape"):
        check_tensors(architecture, {**tensors, "lm_head.weight": torch.zeros(3, 3)})
    bias = {f"model.layers.{layer}.mlp.gate.bias": torch.zeros(5) for layer in range(2)}
    check_tensors(architecture, {**tensors, **bias})
