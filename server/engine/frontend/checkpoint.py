"""Reading a checkpoint directory far enough to refuse a bad one before vLLM starts."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgate.experts.checkpoint.configuration import ARCHITECTURES, read_architecture
from flexgate.experts.checkpoint.layout import CONFIG_NAME, ROUTER_BIAS_KEY, Architecture, expected_shapes
from flexgate.experts.checkpoint.ownership import OWNERSHIP_NAME, Ownership, Unit, parse_ownership, unnamed
from flexgate.experts.checkpoint.reader import open_weights, read_json
from flexgate.experts.errors import LayoutError, OwnershipInvalid
from flexgate.experts.io.tensorfile import TensorFile
from flexgate.experts.package.weights import MAX_ABSOLUTE
from flexgate.kernels.gated_topk import MAX_EXPERTS
from flexgate.server.engine.frontend.identity import FileIdentity, identities


class CheckpointError(ValueError):
    """The model directory cannot be served; the message is one sentence that says why."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model directory that may be loaded."""

    path: Path
    architecture: Architecture
    ownership: Ownership
    stored_dtype: str
    files: Mapping[str, FileIdentity]  # of all that lies in the directory, from before any of it was read

    @property
    def experts(self) -> tuple[Unit, ...]:
        """The units by number, as the catalogue names them."""
        return self.ownership.units

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
    architecture = _architecture(path)
    if architecture.num_experts > MAX_EXPERTS:
        raise CheckpointError(
            f"{path} has {architecture.num_experts} experts in a layer; flexgate serves at most {MAX_EXPERTS}"
        )
    with _open_weights(path) as tensors:
        stored_dtype = _check_headers(path, tensors, architecture)
    return Checkpoint(path, architecture, _ownership(path, architecture), stored_dtype, files)


def require_unchanged(checkpoint: Checkpoint) -> None:
    """Refuse a directory of which a file was changed, replaced, added or removed since it was first looked at.

    Raises:
        CheckpointError: naming the file.
    """
    now = identities(checkpoint.path)
    for name in sorted(now.keys() | checkpoint.files.keys()):
        if now.get(name) != checkpoint.files.get(name):
            raise CheckpointError(
                f"{checkpoint.path / name} was changed while the server started: stop what writes to it and start again"
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


def _architecture(path: Path) -> Architecture:
    config = read_object(path / CONFIG_NAME)
    try:
        architecture = read_architecture(config)
    except LayoutError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if config.get("architectures") is None:
        raise CheckpointError(f"{path}: config.json: architectures is missing, expected {ARCHITECTURES!r}")
    return architecture


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a model directory, strictly: no key twice, no NaN; raises ``CheckpointError``."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is not a model directory: {path.name} is missing")
    try:
        return read_json(path)
    except LayoutError as error:
        raise CheckpointError(str(error)) from error


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


def _ownership(path: Path, architecture: Architecture) -> Ownership:
    """The units of ``flexgate.json``; without one, ``public`` and ``expert-1``, ``expert-2``, …"""
    experts_L = (architecture.num_experts,) * architecture.num_hidden_layers
    manifest = path / OWNERSHIP_NAME
    try:
        if not manifest.is_file():
            return unnamed(experts_L)
        return parse_ownership(read_object(manifest), experts_L, str(manifest))
    except OwnershipInvalid as error:
        raise CheckpointError(str(error)) from error
