"""Making an expert package: weights as a stream, then the manifest with their digests, then the signature."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from flexgate.experts.base import BaseIdentity
from flexgate.experts.errors import OutputRefused
from flexgate.experts.manifest import Base, Manifest, Statement, Weights
from flexgate.experts.output import new_directory, new_file, sync, write_new
from flexgate.experts.package import (
    BIAS_KEY,
    FFN_KEYS,
    MANIFEST_NAME,
    ROW_KEY,
    SIGNATURE_NAME,
    WEIGHTS_NAME,
    ExpertLayer,
    package_shapes,
)
from flexgate.experts.signature import read_private_key
from flexgate.experts.tensorfile import TensorFileWriter, tensor_bytes

Chunks = Callable[[str], Iterable[memoryview]]
"""The bytes of a package's tensor by its name, in pieces."""


def write_package(
    target: Path, statement: Statement, base: BaseIdentity, chunks: Chunks, *, biased: bool, key: Path | None
) -> Manifest:
    """Write the package ``target``; ``key`` is the owner's private key, None leaves it unsigned.

    Raises:
        OutputRefused: ``target`` exists or cannot be written; nothing is left behind.
        KeyInvalid: ``key`` is none.
    """
    private = None if key is None else read_private_key(key)
    with new_directory(target) as partial:
        weights = _write_weights(partial / WEIGHTS_NAME, base, chunks, biased=biased)
        manifest = Manifest(**dict(statement), base=Base.of(base), weights=weights)
        write_new(partial / MANIFEST_NAME, manifest.to_json())
        if private is not None:
            write_new(partial / SIGNATURE_NAME, private.sign(manifest.to_json()))
    return manifest


def sign_package(directory: Path, key: Path) -> None:
    """Add ``manifest.sig`` to an unsigned package."""
    private = read_private_key(key)
    try:
        text = (directory / MANIFEST_NAME).read_bytes()
    except OSError as error:
        raise OutputRefused(f"{directory} is no package: {MANIFEST_NAME}: {error.strerror}") from error
    write_new(directory / SIGNATURE_NAME, private.sign(text))
    sync(directory)


def layer_chunks(layer_of: Callable[[int], ExpertLayer]) -> Chunks:
    """Chunks from tensors; a layer is asked for once per tensor."""

    def chunks(name: str) -> Iterable[memoryview]:
        number = int(name.split(".")[1])
        layer = layer_of(number)
        names = [key.format(layer=number) for key in (*FFN_KEYS, ROW_KEY, BIAS_KEY)]
        tensors = (layer.gate_proj_FH, layer.up_proj_FH, layer.down_proj_HF, layer.router_row_H, layer.router_bias)
        tensor = dict(zip(names, tensors, strict=True))[name]
        return () if tensor is None else (tensor_bytes(tensor),)

    return chunks


def _write_weights(path: Path, base: BaseIdentity, chunks: Chunks, *, biased: bool) -> Weights:
    shapes = package_shapes(base.architecture, biased=biased)
    with new_file(path, mode=0o644) as descriptor:
        writer = TensorFileWriter(descriptor, {name: (base.dtype, shape) for name, shape in shapes.items()})
        for name in shapes:
            writer.write(name, chunks(name))
        digest = writer.finish()
    return Weights(sha256=digest, bytes=writer.size, tensors=writer.digests)
