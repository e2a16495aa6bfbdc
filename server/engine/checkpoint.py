"""Reading a checkpoint directory far enough to refuse a bad one before vLLM starts."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from flexgate.experts.errors import LayoutError
from flexgate.experts.layout import (
    CONFIG_NAME,
    INDEX_NAME,
    ROUTER_BIAS_KEY,
    WEIGHTS_NAME,
    Architecture,
    expected_shapes,
)
from flexgate.experts.package import MAX_ABSOLUTE
from flexgate.kernels.gated_topk import MAX_SLOTS

MANIFEST_NAME = "flexgate.json"
PUBLIC_EXPERT = "public"
COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
)
SERVED = {  # what the model's code computes, whatever else config.json may ask for
    "architectures": ["FlexOlmoForCausalLM"],
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_type": "default",
}


class CheckpointError(ValueError):
    """The model directory cannot be served; the message is one sentence that says why."""


@dataclass(frozen=True, slots=True)
class ExpertEntry:
    """Who is behind one index of the checkpoint."""

    id: str
    owner: str
    domain: str
    required: bool = False
    """Whether every request uses it, whatever its tenant may leave out."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model directory that may be loaded."""

    path: Path
    architecture: Architecture
    experts: tuple[ExpertEntry, ...]
    files: tuple[Path, ...]
    stored_dtype: str

    @property
    def parameters_per_expert(self) -> int:
        """FFN and router parameters of one expert over all layers."""
        a = self.architecture
        return a.num_hidden_layers * (3 * a.hidden_size * a.intermediate_size + a.hidden_size)


def read_checkpoint(path: Path) -> Checkpoint:
    """Check configuration, manifest, tensor names, shapes and dtypes from the headers alone.

    Raises:
        CheckpointError: the directory is missing, incomplete, truncated, of another
            architecture, quantised, or has mismatched shapes or too many experts.
    """
    config = _read_json(path / CONFIG_NAME)
    architecture = _architecture(path, config)
    if architecture.num_experts > MAX_SLOTS:
        raise CheckpointError(f"{path} has {architecture.num_experts} experts; flexgate serves at most {MAX_SLOTS}")
    files = _weight_files(path)
    stored_dtype = _check_headers(files, architecture)
    return Checkpoint(path, architecture, _experts(path, architecture), files, stored_dtype)


def require_bounded(checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None) -> None:
    """Read every tensor once, one at a time, and refuse NaN, infinity and what a package may not hold either.

    Args:
        progress: called with bytes read and bytes in all.

    Raises:
        CheckpointError: naming the first tensor that is not finite, or out of bounds.
    """
    total = sum(file.stat().st_size for file in checkpoint.files)
    done = 0
    for name, tensor in _tensors(checkpoint.files):
        low, high = tensor.aminmax()
        largest = max(-float(low), float(high))
        if not math.isfinite(largest):
            raise CheckpointError(f"{checkpoint.path}: {name} holds NaN or infinite values")
        if largest > MAX_ABSOLUTE:
            raise CheckpointError(
                f"{checkpoint.path}: {name} holds a value of magnitude {largest:.4g}; "
                f"flexgate serves at most {MAX_ABSOLUTE:g}"
            )
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)


def _tensors(files: tuple[Path, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():
                yield name, reader.get_tensor(name)


def _architecture(path: Path, config: dict[str, Any]) -> Architecture:
    if "quantization_config" in config:
        raise CheckpointError(f"{path} is quantised; flexgate serves float32 and bfloat16 only")
    try:
        architecture = Architecture.from_config(config)
    except (LayoutError, TypeError) as error:
        raise CheckpointError(f"{path} is not a FlexOlmo checkpoint: {error}") from error
    for name in COUNTS:
        value = getattr(architecture, name)
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{path / CONFIG_NAME}: {name} must be a positive integer, not {value!r}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    given = {
        "architectures": config.get("architectures"),
        "hidden_act": config.get("hidden_act", "silu"),
        "attention_bias": config.get("attention_bias", False),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "head_dim": config.get("head_dim") or architecture.head_size,
        "rope_type": rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope,
    }
    wanted = SERVED | {"head_dim": architecture.head_size}
    for name, value in given.items():
        if value != wanted[name]:
            raise CheckpointError(f"{path / CONFIG_NAME}: {name} is {value!r}; flexgate serves {wanted[name]!r} only")
    return architecture


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is not a model directory: {path.name} is missing")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value


def _weight_files(path: Path) -> tuple[Path, ...]:
    if (path / WEIGHTS_NAME).is_file():
        return (path / WEIGHTS_NAME,)
    if not (path / INDEX_NAME).is_file():
        raise CheckpointError(f"{path} has neither {WEIGHTS_NAME} nor {INDEX_NAME}")
    weight_map = _read_json(path / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX_NAME} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{path / INDEX_NAME} names a file outside its folder: {name!r}")
        if not (path / name).is_file():
            raise CheckpointError(f"{path} lacks the shard {name}")
    return tuple(path / name for name in names)


def _check_headers(files: tuple[Path, ...], architecture: Architecture) -> str:
    expected = expected_shapes(architecture)
    optional = {
        ROUTER_BIAS_KEY.format(layer=layer): (architecture.num_experts,)
        for layer in range(architecture.num_hidden_layers)
    }
    found: set[str] = set()
    dtypes: set[str] = set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():
                    part = reader.get_slice(name)
                    _check_shape(file, name, tuple(part.get_shape()), expected | optional)
                    found.add(name)
                    dtypes.add(part.get_dtype())
        except SafetensorError as error:
            raise CheckpointError(f"{file} is truncated or not safetensors: {error}") from error
    if missing := sorted(expected.keys() - found):
        raise CheckpointError(f"{files[0].parent} lacks {len(missing)} tensors, the first is {missing[0]}")
    if dtypes - {"F32", "BF16"}:
        raise CheckpointError(
            f"{files[0].parent} stores {', '.join(sorted(dtypes))}; "
            "flexgate serves float32 (F32) and bfloat16 (BF16) checkpoints"
        )
    return "float32" if "F32" in dtypes else "bfloat16"


def _check_shape(file: Path, name: str, shape: tuple[int, ...], expected: dict[str, tuple[int, ...]]) -> None:
    if name not in expected:
        raise CheckpointError(f"{file} holds an unknown tensor {name}")
    if shape != expected[name]:
        raise CheckpointError(f"{file}: {name} has shape {list(shape)}, config.json asks for {list(expected[name])}")


def _experts(path: Path, architecture: Architecture) -> tuple[ExpertEntry, ...]:
    """The manifest's experts; without one, ``public`` and ``expert-1``, ``expert-2``, …"""
    count = architecture.num_experts
    if not (path / MANIFEST_NAME).is_file():
        names = [PUBLIC_EXPERT, *(f"expert-{index}" for index in range(1, count))]
        return tuple(ExpertEntry(name, "unknown", "unknown") for name in names)
    entries = _read_json(path / MANIFEST_NAME).get("experts")
    if not isinstance(entries, list) or len(entries) != count:
        raise CheckpointError(f"{path / MANIFEST_NAME} must list the checkpoint's {count} experts")
    try:
        experts = tuple(
            ExpertEntry(str(e["id"]), str(e["owner"]), str(e["domain"]), e.get("required", False)) for e in entries
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST_NAME}: every expert needs id, owner and domain") from error
    if experts[0].id != PUBLIC_EXPERT:
        raise CheckpointError(f"{path / MANIFEST_NAME}: expert 0 must be {PUBLIC_EXPERT!r}")
    for expert in experts:
        if not isinstance(expert.required, bool):
            raise CheckpointError(f"{path / MANIFEST_NAME}: 'required' of {expert.id!r} must be true or false")
    if len({expert.id for expert in experts}) != count:
        raise CheckpointError(f"{path / MANIFEST_NAME}: expert ids must be distinct")
    return experts
