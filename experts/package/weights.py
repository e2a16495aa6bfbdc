"""The weights of an expert package: what ``expert.safetensors`` holds, and reading them a layer at a time.

A package is a directory with ``manifest.json``, ``manifest.sig`` and ``expert.safetensors``. Weights can be loaded only
through ``CheckedWeights``, which exists for files that passed ``check_weights``: exact names, shapes and dtype, finite,
within bounds, of the stated digest. Processes that did not check a package themselves get a ``WeightsTicket`` and check
again (``open_weights``). Nothing here knows policies or manifests, so it may be loaded inside an inference engine.

Shapes: H hidden, F expert intermediate, R rank, I and O input and output of a projection.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy
from torch import Tensor
from torch.nn.functional import pad

from flexgate.experts.checkpoint.base import BaseArchitecture
from flexgate.experts.errors import DigestMismatch, PackageUnreadable, TensorFileError, WeightsInvalid
from flexgate.experts.io.hashing import Digests
from flexgate.experts.io.progress import Progress, silent
from flexgate.experts.io.tensorfile import DTYPES, TensorFile, TensorInfo, file_digest
from flexgate.experts.package.files import WEIGHTS_NAME
from flexgate.experts.package.size import FULL, ExpertSize

ROW_KEY: Final = "layers.{layer}.router.weight"
BIAS_KEY: Final = "layers.{layer}.router.bias"
"""Optional, in all layers or none, at most zero (the paper's negative bias); all zero is written as absent."""

MAX_ABSOLUTE: Final = 1e4
MAX_RMS: Final = 1e2
"""Bounds of every tensor's largest and root-mean-square value: beyond any trained expert, far from overflow."""


@dataclass(frozen=True)
class ExpertLayer:
    """One layer of one expert in its stored dtype."""

    gate_proj_FH: Tensor
    up_proj_FH: Tensor
    down_proj_HF: Tensor
    router_row_H: Tensor
    router_bias: Tensor | None
    """Shape ``[1]``."""

    @property
    def ffn(self) -> tuple[Tensor, ...]:
        """The FFN in the order of ``ExpertSize.ffn_shapes``."""
        return self.gate_proj_FH, self.up_proj_FH, self.down_proj_HF


@dataclass(frozen=True)
class Factors:
    """What is added to one projection of the public expert, ``B A``, in the stored dtype."""

    a_RI: Tensor
    b_OR: Tensor

    def product(self) -> Tensor:
        """``[O, I]`` in float32."""
        return self.b_OR.float() @ self.a_RI.float()


@dataclass(frozen=True)
class LowRankLayer:
    """One layer of an expert of low rank, which is nothing without the public expert."""

    gate_proj: Factors
    up_proj: Factors
    down_proj: Factors
    router_row_H: Tensor
    router_bias: Tensor | None
    """Shape ``[1]``."""

    @property
    def rank(self) -> int:
        """Of every projection."""
        return len(self.gate_proj.a_RI)

    @property
    def factors(self) -> tuple[Factors, Factors, Factors]:
        """In the order of ``layout.EXPERT_KEYS``."""
        return self.gate_proj, self.up_proj, self.down_proj

    @property
    def ffn(self) -> tuple[Tensor, ...]:
        """The factors in the order of ``ExpertSize.ffn_shapes``."""
        return tuple(part for one in self.factors for part in (one.a_RI, one.b_OR))


@dataclass(frozen=True)
class WeightsTicket:
    """What another process of this host needs to open the same checked file."""

    path: Path
    digest: str
    architecture: BaseArchitecture
    dtype: str
    size: ExpertSize = FULL


_CHECKED: Final = object()


class CheckedWeights:
    """An open ``expert.safetensors`` that passed every check; only ``check_weights`` makes one."""

    def __init__(self, token: object, file: TensorFile, ticket: WeightsTicket, digests: Mapping[str, str]) -> None:
        if token is not _CHECKED:
            raise WeightsInvalid("weights are opened with open_package or open_weights, which check them")
        self._file = file
        self.ticket = ticket
        self.digests = digests
        """SHA-256 of every tensor's bytes."""

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return self.ticket.architecture.num_hidden_layers

    @property
    def biased(self) -> bool:
        """Whether router biases are stored."""
        return BIAS_KEY.format(layer=0) in self._file.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.end - info.begin for info in self._file.tensors.values())

    def layer(self, number: int) -> ExpertLayer:
        """Read one layer from the file that was checked, in the width of the model: a narrow FFN ends in zeros.

        Raises:
            WeightsInvalid: the expert is of low rank, so that the file alone does not have its FFN.
        """
        if self.ticket.size.rank is not None:
            raise WeightsInvalid(f"an expert of {self.ticket.size} has no FFN without the public one: merge it first")
        gate, up, down = self._ffn(number)
        missing = self.ticket.architecture.intermediate_size - len(gate)
        gate, up = (pad(part_FH, (0, 0, 0, missing)) for part_FH in (gate, up))
        return ExpertLayer(gate, up, pad(down, (0, missing)), *self._router(number))

    def low_rank_layer(self, number: int) -> LowRankLayer:
        """Read one layer's factors from the file that was checked; raises ``WeightsInvalid`` where it has none."""
        if self.ticket.size.rank is None:
            raise WeightsInvalid(f"an expert of size {self.ticket.size} has no factors")
        parts = self._ffn(number)
        gate, up, down = (Factors(*pair) for pair in zip(parts[::2], parts[1::2], strict=True))
        return LowRankLayer(gate, up, down, *self._router(number))

    def _ffn(self, number: int) -> list[Tensor]:
        shapes = self.ticket.size.ffn_shapes(self.ticket.architecture)
        return [self._file.read(key.format(layer=number)) for key in shapes]

    def _router(self, number: int) -> tuple[Tensor, Tensor | None]:
        bias = self._file.read(BIAS_KEY.format(layer=number)) if self.biased else None
        return self._file.read(ROW_KEY.format(layer=number)), bias

    def file(self) -> TensorFile:
        """The open file, to stream from."""
        return self._file

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> CheckedWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def package_shapes(
    architecture: BaseArchitecture, *, biased: bool, size: ExpertSize = FULL
) -> dict[str, tuple[int, ...]]:
    """Every tensor of a package with its shape, layer by layer."""
    ffn = size.ffn_shapes(architecture)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(architecture.num_hidden_layers):
        shapes |= {key.format(layer=layer): shape for key, shape in ffn.items()}
        shapes[ROW_KEY.format(layer=layer)] = (architecture.hidden_size,)
        if biased:
            shapes[BIAS_KEY.format(layer=layer)] = (1,)
    return shapes


def package_bytes(architecture: BaseArchitecture, dtype: str, size: ExpertSize = FULL) -> int:
    """Bytes of the tensors of a package without bias."""
    shapes = package_shapes(architecture, biased=False, size=size).values()
    return sum(math.prod(shape) for shape in shapes) * DTYPES[dtype].itemsize


def open_weights(ticket: WeightsTicket, progress: Progress = silent) -> CheckedWeights:
    """Check a private copy again, in the process that will use it.

    Raises:
        PackageError: it is missing, or not what the ticket says.
    """
    try:
        descriptor = os.open(ticket.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise PackageUnreadable(f"{ticket.path} cannot be opened: {error.strerror}") from error
    return check_weights(descriptor, ticket, progress)


def check_weights(descriptor: int, ticket: WeightsTicket, progress: Progress = silent) -> CheckedWeights:
    """Take over an open file and check all of it: header first, then every byte once.

    Raises:
        WeightsInvalid: tensors other than the architecture asks for, NaN, infinity, or values out of bounds.
        DigestMismatch: the file is not the one that the ticket names.
    """
    try:
        file = TensorFile(descriptor, WEIGHTS_NAME)
    except TensorFileError as error:
        raise WeightsInvalid(str(error)) from error
    try:
        _check_names(file, ticket)
        digests = _check_values(file, ticket.digest, progress)
        if ticket.size.rank is not None:
            _check_products(file, ticket)
        return CheckedWeights(_CHECKED, file, ticket, digests)
    except BaseException:
        file.close()
        raise


def _check_names(file: TensorFile, ticket: WeightsTicket) -> None:
    biased = BIAS_KEY.format(layer=0) in file.tensors
    expected = package_shapes(ticket.architecture, biased=biased, size=ticket.size)
    if odd := sorted(file.tensors.keys() ^ expected.keys()):
        verb = "lacks" if odd[0] in expected else "has an unknown tensor"
        raise WeightsInvalid(f"{WEIGHTS_NAME} {verb} {odd[0]!r}")
    for name, info in file.tensors.items():
        if info.shape != expected[name]:
            raise WeightsInvalid(f"{name} has shape {list(info.shape)}, expected {list(expected[name])}")
        if info.dtype != ticket.dtype:
            raise WeightsInvalid(f"{name} is stored as {info.dtype}, expected {ticket.dtype}")


def _check_values(file: TensorFile, expected: str, progress: Progress) -> dict[str, str]:
    zero_bias = True
    with Digests() as sums:
        for name, info in file.tensors.items():
            square, largest = 0.0, 0.0
            for chunk in file.chunks(name):
                sums.add(name, chunk)
                largest, part = _magnitudes(chunk, info, name, largest)
                square += part
                zero_bias = zero_bias and not (".router.bias" in name and any(chunk))
                progress(len(chunk))
            _check_bounds(name, largest, math.sqrt(square / math.prod(info.shape)))
        digests = {name: sums.hex(name) for name in file.tensors}
    if BIAS_KEY.format(layer=0) in file.tensors and zero_bias:
        raise WeightsInvalid("the router bias is zero in every layer: leave it out")
    if (whole := file_digest(file.header, digests)) != expected:
        raise DigestMismatch(f"{WEIGHTS_NAME} has digest {whole}, the manifest names {expected}")
    return digests


def _check_products(file: TensorFile, ticket: WeightsTicket) -> None:
    """Bound what is added to the public expert as a stored FFN is bounded, by norms: no product is computed."""
    keys = list(ticket.size.ffn_shapes(ticket.architecture))
    for layer in range(ticket.architecture.num_hidden_layers):
        for down, up in zip(keys[::2], keys[1::2], strict=True):
            a_RI, b_OR = (file.read(key.format(layer=layer)).float() for key in (down, up))
            largest = float(b_OR.norm(dim=1).max() * a_RI.norm(dim=0).max())
            rms = float(b_OR.norm() * a_RI.norm()) / math.sqrt(len(b_OR) * a_RI.shape[1])
            _check_bounds(f"the product of {up.format(layer=layer)} and {down.format(layer=layer)}", largest, rms)


def _magnitudes(chunk: memoryview, info: TensorInfo, name: str, largest: float) -> tuple[float, float]:
    """The largest absolute value so far, and the sum of squares of this piece."""
    values = _floats(chunk, info.dtype)
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise WeightsInvalid(f"{name} holds NaN or infinity")
    if ".router.bias" in name and high > 0:
        raise WeightsInvalid(f"{name} is {high}: a router bias is at most 0")
    return max(largest, -low, high), float(numpy.einsum("i,i->", values, values))


def _floats(chunk: memoryview, dtype: str) -> numpy.ndarray[tuple[int], numpy.dtype[numpy.float32]]:
    """The values as float32; NumPy, because it spends one thread and little time on a piece of this size."""
    if dtype == "F32":
        return numpy.frombuffer(chunk, numpy.float32)
    halves = numpy.frombuffer(chunk, numpy.uint16).astype(numpy.uint32)
    return (halves << 16).view(numpy.float32)


def _check_bounds(name: str, largest: float, rms: float) -> None:
    if largest > MAX_ABSOLUTE:
        raise WeightsInvalid(f"{name} holds a value of magnitude {largest:.4g}, at most {MAX_ABSOLUTE:g} is allowed")
    if rms > MAX_RMS:
        raise WeightsInvalid(f"{name} has root mean square {rms:.4g}, at most {MAX_RMS:g} is allowed")
