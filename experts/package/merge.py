"""Merging: a public anchor and verified packages become one checkpoint, by concatenation, without joint training.

Of full experts nothing is computed: every byte of the result is a byte of a part (FlexOlmo, section 3.3), so experts
that are extracted again are the packages they were, and the order of the packages only permutes indices. A checkpoint
has experts of one width, so narrow experts and low-rank ones are written in it (see ``materialise``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from flexgate.experts.checkpoint.base import BaseArchitecture, BaseIdentity, SharedDigests, identity_of
from flexgate.experts.checkpoint.layout import EXPERT_KEYS, ROUTER_BIAS_KEY, ROUTER_KEY
from flexgate.experts.checkpoint.reader import CheckpointReader
from flexgate.experts.checkpoint.shards import SHARD_BYTES, to_json, write_model
from flexgate.experts.errors import MergeError
from flexgate.experts.io.progress import Progress, silent
from flexgate.experts.io.stream import Job, Piece, fingerprint
from flexgate.experts.io.tensorfile import DTYPES
from flexgate.experts.package.extract import anchor_pieces
from flexgate.experts.package.files import MANIFEST_NAME, SIGNATURE_NAME
from flexgate.experts.package.manifest import parse_manifest
from flexgate.experts.package.materialise import ffn_pieces
from flexgate.experts.package.provenance import FOLDER, MODEL_MANIFEST, Record, expert_entries, model_manifest
from flexgate.experts.package.verify import VerifiedPackage
from flexgate.experts.package.weights import BIAS_KEY, ROW_KEY


def combine(
    anchor: Path,
    packages: Sequence[VerifiedPackage],
    target: Path,
    *,
    top_k: int,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> None:
    """Write the merged checkpoint ``target``: index 0 is the anchor's expert, then ``packages`` in their order.

    Raises:
        LayoutError: ``anchor`` is no checkpoint, or changed while it was read.
        MergeError: packages of another base (the message names the tensor), two of one id, or an impossible ``top_k``.
        OutputRefused: ``target`` exists or cannot be written.
    """
    with CheckpointReader(anchor) as checkpoint, SharedDigests(checkpoint) as shared:
        _check(checkpoint, packages, top_k)
        sources = [*checkpoint.files(), *(package.weights.file() for package in packages)]
        with Job(target, json.dumps([top_k, shard_bytes, fingerprint(sources)])) as job:
            config = {**checkpoint.config, "num_experts": 1 + len(packages), "num_experts_per_tok": top_k}
            pieces = _pieces(checkpoint, shared, packages)
            write_model(job, config, pieces, beside=anchor, shard_bytes=shard_bytes, progress=progress)
            base = _written_base(job, shared, packages, progress)
            _write_provenance(job, anchor, packages, base.digest)
            job.finish()


def _check(checkpoint: CheckpointReader, packages: Sequence[VerifiedPackage], top_k: int) -> None:
    count = checkpoint.architecture.num_experts
    if count != 1:
        raise MergeError(f"{checkpoint.directory} has {count} experts; extract its anchor ('public') first")
    if not packages:
        raise MergeError("there is nothing to merge: give at least one package")
    ids = [package.manifest.id for package in packages]
    if twice := sorted({expert for expert in ids if ids.count(expert) > 1}):
        raise MergeError(f"two packages have the id {twice[0]!r}")
    if not 1 <= top_k <= 1 + len(packages):
        raise MergeError(f"top_k is {top_k}; with {1 + len(packages)} experts it must be 1 to {1 + len(packages)}")
    numbers = BaseArchitecture.of(checkpoint.architecture)
    for package in packages:
        _check_base(package, BaseIdentity(numbers, checkpoint.dtype, package.manifest.base.identity().tensors))


def _check_base(package: VerifiedPackage, base: BaseIdentity) -> None:
    if difference := base.difference(package.manifest.base.identity()):
        raise MergeError(f"expert {package.manifest.id!r} was made for another base model: {difference}")


def _written_base(
    job: Job, shared: SharedDigests, packages: Sequence[VerifiedPackage], progress: Progress
) -> BaseIdentity:
    """The base whose very bytes were written, if it is that of every package; else nothing of the merge stays."""
    if job.resumed:  # what an earlier run wrote has not passed here
        with CheckpointReader(job.folder) as written:
            base = identity_of(written, progress)
    else:
        base = shared.identity()
    try:
        for package in packages:
            _check_base(package, base)
    except MergeError:
        job.abandon()
        raise
    return base


def _pieces(
    checkpoint: CheckpointReader, shared: SharedDigests, packages: Sequence[VerifiedPackage]
) -> dict[str, Piece]:
    """Every tensor of the merged model, layer by layer, those without a layer first."""
    pieces = {
        key: replace(piece, chunks=partial(shared.chunks, key)) for key, piece in anchor_pieces(checkpoint).items()
    }
    for index, package in enumerate(packages, start=1):
        base = package.manifest.base.identity()
        for layer in range(package.weights.layers):
            keys = [key.format(layer=layer, expert=index) for key in EXPERT_KEYS]
            pieces |= zip(keys, ffn_pieces(package.weights, base, checkpoint, layer), strict=True)
    biased = ROUTER_BIAS_KEY.format(layer=0) in checkpoint or any(package.weights.biased for package in packages)
    for layer in range(checkpoint.architecture.num_hidden_layers):
        size = (1 + len(packages), checkpoint.architecture.hidden_size)
        key = ROUTER_KEY.format(layer=layer)
        pieces[key] = Piece(checkpoint.dtype, size, partial(_router_rows, shared, packages, layer))
        if biased:
            key = ROUTER_BIAS_KEY.format(layer=layer)
            pieces[key] = Piece(checkpoint.dtype, size[:1], partial(_biases, checkpoint, shared, packages, layer))
    return dict(sorted(pieces.items(), key=lambda item: _place(item[0])))


def _place(key: str) -> tuple[int, str]:
    words = key.split(".")
    return (int(words[2]), key) if words[1] == "layers" else (-1, key)


def _router_rows(shared: SharedDigests, packages: Sequence[VerifiedPackage], layer: int) -> Iterable[memoryview]:
    yield from shared.chunks(ROUTER_KEY.format(layer=layer), row=True)
    for package in packages:
        yield from package.weights.file().chunks(ROW_KEY.format(layer=layer))


def _biases(
    checkpoint: CheckpointReader, shared: SharedDigests, packages: Sequence[VerifiedPackage], layer: int
) -> Iterable[memoryview]:
    zero = memoryview(bytes(DTYPES[checkpoint.dtype].itemsize))
    key = ROUTER_BIAS_KEY.format(layer=layer)
    yield from shared.chunks(key, row=True) if key in checkpoint else (zero,)
    for package in packages:
        name = BIAS_KEY.format(layer=layer)
        yield from package.weights.file().chunks(name) if package.weights.biased else (zero,)


def _write_provenance(job: Job, anchor: Path, packages: Sequence[VerifiedPackage], digest: str) -> None:
    records = []
    for package in packages:
        text = (package.directory / MANIFEST_NAME).read_bytes()
        signature = package.directory / SIGNATURE_NAME
        record = Record(parse_manifest(text), text, signature.read_bytes() if signature.is_file() else None)
        job.write_text(f"{FOLDER}/{package.manifest.id}.json", text)
        if record.signature is not None:
            job.write_text(f"{FOLDER}/{package.manifest.id}.sig", record.signature)
        records.append(record)
    manifest = model_manifest(records, digest, expert_entries(anchor, 1)[0])
    job.write_text(MODEL_MANIFEST, to_json(manifest))
