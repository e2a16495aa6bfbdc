"""Reading a checkpoint directory far enough to refuse a bad one before vLLM starts."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flexgate.experts.checkpoint.families import Routing
from flexgate.experts.checkpoint.layout import CONFIG_NAME, Architecture, bias_shapes
from flexgate.experts.checkpoint.ownership import OWNERSHIP_NAME, Ownership, Unit, parse_ownership, unnamed
from flexgate.experts.checkpoint.reader import open_weights, read_json
from flexgate.experts.checkpoint.served import SERVED, Described, Served, read_served
from flexgate.experts.errors import LayoutError, OwnershipInvalid
from flexgate.experts.io.tensorfile import TensorFile
from flexgate.experts.package.weights import MAX_ABSOLUTE
from flexgate.kernels.gated_topk import MAX_EXPERTS
from flexgate.server.engine.frontend.identity import FileIdentity, identities

LAYER: Final = re.compile(r"model\.layers\.(\d{1,6})\.")
PLAIN: Final = Routing(renormalize=False)


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
    kind: Served = SERVED["flex_olmo"]
    routing: Routing = PLAIN

    @property
    def experts(self) -> tuple[Unit, ...]:
        """The units by number, as the catalogue names them."""
        return self.ownership.units

    @property
    def parameters_per_expert(self) -> int:
        """FFN and router parameters of one expert over all layers."""
        a = self.architecture
        return self.moe_layers * (3 * a.hidden_size * a.intermediate_size + a.hidden_size)

    @property
    def parameters_beside_experts(self) -> int:
        """FFN parameters that every token uses: of layers without experts, and of experts outside of the routers."""
        a, moe_layers = self.architecture, self.moe_layers
        sizes = a.sizes
        wide = (a.num_hidden_layers - moe_layers) * sizes.get("D", 0) + moe_layers * sizes.get("S", 0)
        return 3 * a.hidden_size * wide

    @property
    def ungated(self) -> dict[str, Any]:
        """What every token passes outside of all gates, as responses name it; empty where nothing is."""
        dense = self.architecture.num_hidden_layers - self.moe_layers
        shared = {"shared_expert": True} if self.kind.layout.shared else {}
        return shared | ({"dense_layers": dense} if dense else {})

    @property
    def moe_layers(self) -> int:
        """How many layers have experts."""
        return sum(map(bool, self.ownership.unit_LE))


def read_checkpoint(path: Path) -> Checkpoint:
    """Check configuration, manifest, tensor names, shapes and dtypes from the headers alone.

    Raises:
        CheckpointError: the directory is missing, incomplete, truncated, of another
            architecture, quantised, ambiguous, or has mismatched shapes or too many experts.
    """
    files = identities(path)
    described = _described(path)
    architecture = described.numbers
    if architecture.num_experts > MAX_EXPERTS:
        raise CheckpointError(
            f"{path} has {architecture.num_experts} experts in a layer; flexgate serves at most {MAX_EXPERTS}"
        )
    with _open_weights(path) as tensors:
        stored_dtype = _check_headers(path, tensors, described)
    ownership = _ownership(path, described)
    return Checkpoint(path, architecture, ownership, stored_dtype, files, described.kind, described.routing)


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


def _described(path: Path) -> Described:
    config = read_object(path / CONFIG_NAME)
    try:
        return read_served(config)
    except LayoutError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a model directory, strictly: no key twice, no NaN; raises ``CheckpointError``."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is not a model directory: {path.name} is missing")
    try:
        return read_json(path)
    except LayoutError as error:
        raise CheckpointError(str(error)) from error


def _check_headers(path: Path, tensors: Mapping[str, TensorFile], described: Described) -> str:
    expected = described.shapes()
    optional = bias_shapes(described.numbers, described.kind.layout)
    layers = described.numbers.num_hidden_layers
    for name, file in tensors.items():
        layer = LAYER.match(name)
        if layer and layers <= int(layer[1]) < layers + described.further_layers:
            continue
        _check_shape(file.name, name, file.tensors[name].shape, expected | optional)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(f"{path} lacks {len(missing)} tensors, the first is {missing[0]}")
    return "float32" if any(file.tensors[name].dtype == "F32" for name, file in tensors.items()) else "bfloat16"


def _check_shape(file: str, name: str, shape: tuple[int, ...], expected: dict[str, tuple[int, ...]]) -> None:
    if name not in expected:
        raise CheckpointError(f"{file} holds an unknown tensor {name}")
    if shape != expected[name]:
        raise CheckpointError(f"{file}: {name} has shape {list(shape)}, config.json asks for {list(expected[name])}")


def _ownership(path: Path, described: Described) -> Ownership:
    """The units of ``flexgate.json``; without one, a FlexOlmo model has ``public`` and ``expert-1``, ``expert-2``, …"""
    experts_L = described.experts_L
    manifest = path / OWNERSHIP_NAME
    try:
        if manifest.is_file():
            return parse_ownership(read_object(manifest), experts_L, str(manifest))
        if described.kind is SERVED["flex_olmo"]:
            return unnamed(experts_L)
    except OwnershipInvalid as error:
        raise CheckpointError(str(error)) from error
    raise CheckpointError(
        f"{path} has no {OWNERSHIP_NAME}: write down which unit each of its experts belongs to, "
        "with 'flexgate experts assign'"
    )
