"""Making an expert package: weights as a stream, then the manifest with their digests, then the signature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from uuid import uuid4

from flexgate.experts.checkpoint.base import BaseIdentity
from flexgate.experts.errors import PackageUnreadable
from flexgate.experts.io.output import sync, write_new
from flexgate.experts.io.stream import Job, Piece, Written, one_chunk
from flexgate.experts.io.tensorfile import tensor_bytes
from flexgate.experts.package.files import MANIFEST_NAME, SIGNATURE_NAME, WEIGHTS_NAME
from flexgate.experts.package.manifest import FORMATS, Base, Manifest, Statement, Weights
from flexgate.experts.package.signature import read_private_key
from flexgate.experts.package.size import FULL, ExpertSize
from flexgate.experts.package.weights import BIAS_KEY, ROW_KEY, ExpertLayer, LowRankLayer


def write_package(
    target: Path,
    statement: Statement,
    base: BaseIdentity,
    layers: Iterable[ExpertLayer | LowRankLayer],
    *,
    key: Path | None,
    size: ExpertSize = FULL,
) -> Manifest:
    """Write the package ``target`` from tensors in the base's dtype; ``key`` is the owner's private key, None leaves it
    unsigned.

    Raises:
        SizeInvalid: no expert of this base has this size.
        OutputRefused: ``target`` exists or cannot be written.
        KeyInvalid: ``key`` is none.
    """
    size.check(base.architecture)
    if key is not None:
        read_private_key(key)
    pieces: dict[str, Piece] = {}
    for number, layer in enumerate(layers):
        pieces |= _layer_pieces(layer, number, base, size)
    with Job(target, uuid4().hex) as job:
        written = job.write_file(WEIGHTS_NAME, pieces, digests=True)
        manifest = complete(statement, base, written, size)
        write_manifest(job, manifest.to_json(), key)
        job.finish()
    return manifest


def complete(statement: Statement, base: BaseIdentity, written: Written, size: ExpertSize = FULL) -> Manifest:
    """A manifest for weights that are written."""
    weights = Weights(digest=written.digest, bytes=written.size, tensors=dict(written.tensors))
    form = FORMATS[size != FULL]
    said = dict(statement)
    return Manifest(**said, format=form, rank=size.rank, width=size.width, base=Base.of(base), weights=weights)


def write_manifest(job: Job, text: bytes, key: Path | None) -> None:
    """Write ``manifest.json`` and, with a key, its signature."""
    job.write_text(MANIFEST_NAME, text)
    if key is not None:
        job.write_text(SIGNATURE_NAME, read_private_key(key).sign(text))


def sign_package(directory: Path, key: Path) -> None:
    """Add ``manifest.sig`` to an unsigned package."""
    private = read_private_key(key)
    try:
        text = (directory / MANIFEST_NAME).read_bytes()
    except OSError as error:
        raise PackageUnreadable(f"{directory} is not a package: {MANIFEST_NAME}: {error.strerror}") from error
    write_new(directory / SIGNATURE_NAME, private.sign(text))
    sync(directory)


def _layer_pieces(
    layer: ExpertLayer | LowRankLayer, number: int, base: BaseIdentity, size: ExpertSize
) -> Mapping[str, Piece]:
    tensors = {
        **dict(zip(size.ffn_shapes(base.architecture), layer.ffn, strict=True)),
        ROW_KEY: layer.router_row_H,
        **({} if layer.router_bias is None else {BIAS_KEY: layer.router_bias}),
    }
    return {
        key.format(layer=number): Piece(base.dtype, tuple(tensor.shape), one_chunk(tensor_bytes(tensor)))
        for key, tensor in tensors.items()
    }
