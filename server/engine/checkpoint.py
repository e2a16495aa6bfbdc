"""Reading a checkpoint directory far enough to refuse a bad one before vLLM starts."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgate.experts.checkpoint import open_weights
from flexgate.experts.errors import LayoutError
from flexgate.experts.layout import CONFIG_NAME, ROUTER_BIAS_KEY, Architecture, expected_shapes
from flexgate.experts.package import MAX_ABSOLUTE
from flexgate.experts.tensorfile import TensorFile
from flexgate.kernels.gated_topk import MAX_SLOTS
from flexgate.server.engine.identity import FileIdentity, identities

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
    stored_dtype: str
    files: Mapping[str, FileIdentity]  # of all that lies in the directory, from before any of it was read

    @property
    def parameters_per_expert(self) -> int:
        """FFN and router parameters of one expert over all layers."""
        a = self.architecture
        return a.num_hidden_layers * (3 * a.hidden_size * a.intermediate_size + a.hidden_size)


def read_checkpoint(path: Path) -> Checkpoint:
    """Check configuration, manifest, tensor names, shapes and dtypes from the headers alone.

    Raises:
        CheckpointError: the directory is missing, incomplete, truncated, of another
            architecture, quantised, ambiguous, or has mismatched shapes or too many experts.
    """
    files = identities(path)
    config = _read_json(path / CONFIG_NAME)
    architecture = _architecture(path, config)
    if architecture.num_experts > MAX_SLOTS:
        raise CheckpointError(f"{path} has {architecture.num_experts} experts; flexgate serves at most {MAX_SLOTS}")
    with _open_weights(path) as tensors:
        stored_dtype = _check_headers(path, tensors, architecture)
    return Checkpoint(path, architecture, _experts(path, architecture), stored_dtype, files)


def require_unchanged(checkpoint: Checkpoint) -> None:
    """Refuse a directory of which a file was changed, replaced, added or removed since it was first looked at.

    Raises:
        CheckpointError: naming the file.
    """
    now = identities(checkpoint.path)
    for name in sorted(now.keys() | checkpoint.files.keys()):
        if now.get(name) != checkpoint.files.get(name):
            raise CheckpointError(
                f"{checkpoint.path / name} changed while the server started, so what was checked may not be what was "
                "loaded: start again once nothing writes there"
            )


def require_bounded(checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None) -> None:
    """Read every tensor once, one at a time, and refuse NaN, infinity and what a package may not hold either.

    Args:
        progress: called with bytes read and bytes in all.

    Raises:
        CheckpointError: naming the first tensor that is not finite, or out of bounds.
    """
    with _open_weights(checkpoint.path) as tensors:
        total = sum(file.size for file in {*tensors.values()})
        done = 0
        for name, file in tensors.items():
            tensor = file.read(name)
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


@contextmanager
def _open_weights(path: Path) -> Iterator[dict[str, TensorFile]]:
    with ExitStack() as files:
        try:
            tensors = open_weights(path, files)
        except LayoutError as error:
            raise CheckpointError(str(error)) from error
        yield tensors


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


def _check_headers(path: Path, tensors: Mapping[str, TensorFile], architecture: Architecture) -> str:
    expected = expected_shapes(architecture)
    optional = {
        ROUTER_BIAS_KEY.format(layer=layer): (architecture.num_experts,)
        for layer in range(architecture.num_hidden_layers)
    }
    for name, file in tensors.items():
        _check_shape(file.name, name, file.tensors[name].shape, expected | optional)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(f"{path} lacks {len(missing)} tensors, the first is {missing[0]}")
    return "float32" if any(file.tensors[name].dtype == "F32" for name, file in tensors.items()) else "bfloat16"


def _check_shape(file: str, name: str, shape: tuple[int, ...], expected: dict[str, tuple[int, ...]]) -> None:
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
