"""The training model computes what transformers' FlexOlmo computes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import FlexOlmoForCausalLM

from flexgate.experts.checkpoint import read_architecture, read_checkpoint
from flexgate.experts.errors import LayoutError
from flexgate.experts.layout import (
    Architecture,
    check_tensors,
    expected_shapes,
    write_checkpoint,
)
from flexgate.experts.model import FlexOlmo

SHAPES = [
    Architecture(97, 32, 24, 2, 4, 4, num_experts=5, num_experts_per_tok=2),
    Architecture(61, 48, 21, 3, 6, 2, num_experts=6, num_experts_per_tok=6, norm_topk_prob=True),
    Architecture(61, 32, 20, 1, 2, 1, num_experts=1, num_experts_per_tok=1, rope_theta=500000.0),
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


def test_excluding_an_expert_equals_removing_it() -> None:
    full = SHAPES[0]
    tensors = random_tensors(full)
    reduced = Architecture(97, 32, 24, 2, 4, 4, num_experts=4, num_experts_per_tok=2)
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


def test_another_architecture_is_refused() -> None:
    with pytest.raises(LayoutError, match="model_type 'llama'"):
        Architecture.from_config({"model_type": "llama"})


CONFIG = {"model_type": "flex_olmo", **asdict(SHAPES[0])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected 1 to 1024"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected 1 to"),
        ({"num_experts": True}, "num_experts is True, expected 1 to 4096"),
        ({"vocab_size": None}, "vocab_size is None, expected 1 to"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0, expected a positive number"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1, expected true or false"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "only the default kind is read"),
        ({"rope_scaling": {"type": "linear"}}, "only the default kind is read"),
    ],
)
def test_numbers_that_make_no_model_are_refused_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        read_architecture({**CONFIG, **change})


def test_rotary_base_is_read_from_old_and_new_configurations() -> None:
    plain = {name: value for name, value in CONFIG.items() if name != "rope_theta"}
    assert Architecture.from_config(plain).rope_theta == 500000.0
    assert Architecture.from_config({**plain, "rope_theta": 7.0, "rope_scaling": None}).rope_theta == 7.0
    assert Architecture.from_config({**plain, "rope_parameters": {"rope_theta": 9.0}}).rope_theta == 9.0
