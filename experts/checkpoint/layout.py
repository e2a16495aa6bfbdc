"""How a merged FlexOlmo model lies on disk, as data.

The names are those of Hugging Face's ``flex_olmo`` layout: one tensor per expert and projection, one router matrix
per layer whose row ``n`` belongs to expert ``n``. Templates use ``{layer}`` and ``{expert}``.

Shapes: E experts, H hidden, F expert intermediate, V vocabulary, Q query width (heads * head size), K key/value
width. In models of other kinds also A head size, D intermediate of a dense FFN, S of a shared expert, 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from flexgate.experts.errors import LayoutError

SHARED_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "model.embed_tokens.weight": ("V", "H"),
    "model.norm.weight": ("H",),
    "lm_head.weight": ("V", "H"),
}
"""The head is missing where it is tied to the embedding."""
HEAD_KEY: Final = "lm_head.weight"
LAYER_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "model.layers.{layer}.self_attn.q_proj.weight": ("Q", "H"),
    "model.layers.{layer}.self_attn.k_proj.weight": ("K", "H"),
    "model.layers.{layer}.self_attn.v_proj.weight": ("K", "H"),
    "model.layers.{layer}.self_attn.o_proj.weight": ("H", "Q"),
    "model.layers.{layer}.self_attn.q_norm.weight": ("Q",),
    "model.layers.{layer}.self_attn.k_norm.weight": ("K",),
    "model.layers.{layer}.post_attention_layernorm.weight": ("H",),
    "model.layers.{layer}.post_feedforward_layernorm.weight": ("H",),
}
EXPERT_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight": ("F", "H"),
    "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": ("F", "H"),
    "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight": ("H", "F"),
}
ROUTER_KEY: Final = "model.layers.{layer}.mlp.gate.weight"
ROUTER_BIAS_KEY: Final = "model.layers.{layer}.mlp.gate.bias"
"""Optional ``[E]``: an extension of this project that transformers ignores (the paper's negative bias)."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The names and shapes of one kind of checkpoint.

    Attributes:
        layer: tensors of every layer outside of its FFN.
        expert: tensors of every expert.
        router: ``[E, H]`` of every layer with experts.
        bias: ``[E]`` of such a layer's router; None where it has none.
        shared: tensors of such a layer's expert outside of the router.
        dense: FFN of a layer without experts.
    """

    layer: Mapping[str, tuple[str, ...]]
    expert: Mapping[str, tuple[str, ...]]
    router: str
    bias: str | None = None
    shared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dense: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


FLEX_OLMO: Final = Layout(LAYER_KEYS, EXPERT_KEYS, ROUTER_KEY, ROUTER_BIAS_KEY)

ROPE_THETA: Final = 500000.0
"""Hugging Face's default, where config.json names none."""

WEIGHTS_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"
CONFIG_NAME: Final = "config.json"


@dataclass(frozen=True)
class Architecture:
    """The numbers of ``config.json`` that decide shapes and arithmetic; field names are Hugging Face's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    num_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    norm_topk_prob: bool = False
    tie_word_embeddings: bool = False

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def sizes(self) -> dict[str, int]:
        """The shape letters of this module with their values."""
        return {
            "V": self.vocab_size,
            "H": self.hidden_size,
            "F": self.intermediate_size,
            "E": self.num_experts,
            "Q": self.num_attention_heads * self.head_size,
            "K": self.num_key_value_heads * self.head_size,
        }

    def to_config(self, *, eos_token_id: int, pad_token_id: int, dtype: str) -> dict[str, Any]:
        """The ``config.json`` mapping that transformers loads as ``FlexOlmoForCausalLM``."""
        values = asdict(self)
        theta = values.pop("rope_theta")
        return {
            "architectures": ["FlexOlmoForCausalLM"],
            "model_type": "flex_olmo",
            **values,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "dtype": dtype,
        }


def expert_keys(architecture: Architecture, expert: int) -> list[str]:
    """Names of one expert's FFN tensors, layer by layer."""
    layers = range(architecture.num_hidden_layers)
    return [key.format(layer=layer, expert=expert) for layer in layers for key in EXPERT_KEYS]


def router_keys(architecture: Architecture) -> list[str]:
    """Names of the router matrices, layer by layer."""
    return [ROUTER_KEY.format(layer=layer) for layer in range(architecture.num_hidden_layers)]


def bias_keys(architecture: Architecture) -> list[str]:
    """Names of the optional router biases, layer by layer."""
    return [ROUTER_BIAS_KEY.format(layer=layer) for layer in range(architecture.num_hidden_layers)]


def shared_keys(architecture: Architecture) -> list[str]:
    """Names of all tensors that belong to the public anchor and to no expert."""
    layers = range(architecture.num_hidden_layers)
    return [*_outside_layers(architecture), *(key.format(layer=layer) for layer in layers for key in LAYER_KEYS)]


def _outside_layers(architecture: Architecture) -> dict[str, tuple[str, ...]]:
    return {key: shape for key, shape in SHARED_KEYS.items() if key != HEAD_KEY or not architecture.tie_word_embeddings}


def expected_shapes(
    architecture: Architecture, layout: Layout = FLEX_OLMO, experts_L: Sequence[int] | None = None
) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint without router bias, with its shape.

    Args:
        experts_L: how many experts each layer has, where that differs.
    """
    templates: dict[str, tuple[str, ...]] = _outside_layers(architecture)
    for layer, count in enumerate(experts_L or (architecture.num_experts,) * architecture.num_hidden_layers):
        ffn = {layout.router: ("E", "H"), **layout.shared} if count else layout.dense
        templates |= {key.format(layer=layer): shape for key, shape in {**layout.layer, **ffn}.items()}
        for expert in range(count):
            templates |= {key.format(layer=layer, expert=expert): shape for key, shape in layout.expert.items()}
    sizes = architecture.sizes
    return {key: tuple(sizes[letter] for letter in shape) for key, shape in templates.items()}


def bias_shapes(architecture: Architecture, layout: Layout = FLEX_OLMO) -> dict[str, tuple[int, ...]]:
    """The optional router biases of a checkpoint, with their shapes."""
    if layout.bias is None:
        return {}
    layers = range(architecture.num_hidden_layers)
    return {layout.bias.format(layer=layer): (architecture.num_experts,) for layer in layers}


def check_tensors(architecture: Architecture, tensors: Mapping[str, Tensor]) -> None:
    """``check_shapes`` of loaded tensors."""
    check_shapes(architecture, {key: tuple(tensor.shape) for key, tensor in tensors.items()})


def check_shapes(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ``LayoutError`` unless names and shapes are those of ``architecture``.

    Router biases may be added, to every layer.
    """
    expected = expected_shapes(architecture)
    if shapes.keys() & set(bias_keys(architecture)):
        expected |= dict.fromkeys(bias_keys(architecture), (architecture.num_experts,))
    if missing := sorted(expected.keys() - shapes.keys()):
        raise LayoutError(f"checkpoint lacks {len(missing)} tensors, first {missing[0]!r}")
    if extra := sorted(shapes.keys() - expected.keys()):
        raise LayoutError(f"checkpoint has {len(extra)} unknown tensors, first {extra[0]!r}")
    for key, shape in expected.items():
        if shapes[key] != shape:
            raise LayoutError(f"{key} has shape {shapes[key]}, expected {shape}")


def write_checkpoint(
    directory: Path,
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    eos_token_id: int,
    pad_token_id: int,
    shard_bytes: int | None = None,
) -> None:
    """Write ``config.json`` and the weights, in one file or in shards of at most ``shard_bytes`` with an index."""
    check_tensors(architecture, tensors)
    directory.mkdir(parents=True, exist_ok=True)
    stored = {key: tensors[key].detach().to(dtype).contiguous() for key in sorted(tensors)}
    config = architecture.to_config(
        eos_token_id=eos_token_id, pad_token_id=pad_token_id, dtype=str(dtype).removeprefix("torch.")
    )
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    if shard_bytes is None:
        save_file(stored, directory / WEIGHTS_NAME, metadata={"format": "pt"})
        return
    _write_shards(directory, list(_shards(stored, shard_bytes)))


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    used = 0
    for key, tensor in tensors.items():
        if shard and used + tensor.nbytes > shard_bytes:
            yield shard
            shard, used = {}, 0
        shard[key] = tensor
        used += tensor.nbytes
    yield shard


def _write_shards(directory: Path, shards: list[dict[str, Tensor]]) -> None:
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
