"""One expert out of a merged checkpoint, as a package; or its public anchor, as a checkpoint.

Works on any ``flex_olmo`` directory, the published two-expert ones (``Flex-…-2x7B-1T``) included, where index 0 is the
public expert. Tensors pass through in pieces, so a checkpoint may be larger than memory; an interrupted run goes on.
One that makes an expert smaller begins anew: singular vectors that are computed twice need not fit each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from uuid import uuid4

from flexgate.experts.checkpoint.base import BaseArchitecture, BaseIdentity, identity_of
from flexgate.experts.checkpoint.layout import (
    EXPERT_KEYS,
    ROUTER_BIAS_KEY,
    ROUTER_KEY,
    bias_keys,
    expert_keys,
    router_keys,
    shared_keys,
)
from flexgate.experts.checkpoint.reader import CheckpointReader
from flexgate.experts.checkpoint.shards import SHARD_BYTES, to_json, write_model
from flexgate.experts.errors import LayoutError, ManifestInvalid
from flexgate.experts.io.progress import Progress, silent
from flexgate.experts.io.stream import Job, Piece, Written, fingerprint
from flexgate.experts.io.tensorfile import tensor_bytes
from flexgate.experts.package.files import MANIFEST_NAME, SIGNATURE_NAME, WEIGHTS_NAME
from flexgate.experts.package.manifest import Manifest, Statement
from flexgate.experts.package.provenance import MODEL_MANIFEST, Record, expert_entries, model_manifest, read_record
from flexgate.experts.package.reduce import Errors, Reduction
from flexgate.experts.package.signature import read_private_key
from flexgate.experts.package.size import FULL, ExpertSize
from flexgate.experts.package.weights import BIAS_KEY, ROW_KEY
from flexgate.experts.package.write import complete


def find_expert(checkpoint: CheckpointReader, expert: str) -> int:
    """The index of an expert by its id or number; raises ``LayoutError`` with the ids there are."""
    ids = [entry["id"] for entry in expert_entries(checkpoint.directory, checkpoint.architecture.num_experts)]
    if expert in ids:
        return ids.index(expert)
    if expert.isascii() and expert.isdigit() and int(expert) < len(ids):
        return int(expert)
    raise LayoutError(f"{checkpoint.directory} has no expert {expert!r}; it has {', '.join(ids)}")


def extract_expert(
    source: Path,
    expert: str,
    target: Path,
    *,
    statement: Statement | None = None,
    key: Path | None = None,
    size: ExpertSize = FULL,
    on_errors: Callable[[Errors], object] = lambda _: None,
    progress: Progress = silent,
) -> Manifest:
    """Write the package ``target``. Without a statement, the expert's own manifest is restored from the provenance.

    Args:
        size: make the expert this small; an expert that was merged at a width has it again without being asked.
        on_errors: gets what was lost, where ``size`` makes the expert smaller.

    Raises:
        LayoutError: ``source`` is no checkpoint, or has no such expert, or one that no package can be restored from.
        SizeInvalid: no expert of this model has this size.
        ManifestInvalid: nothing says whose expert this is.
        OutputRefused: ``target`` exists or cannot be written.
    """
    private = None if key is None else read_private_key(key)
    with CheckpointReader(source) as checkpoint:
        index = find_expert(checkpoint, expert)
        if index == 0:
            raise LayoutError(f"{expert!r} is the public anchor of {source}, which is extracted as a checkpoint")
        size.check(BaseArchitecture.of(checkpoint.architecture))
        record = _record(checkpoint, index, statement)
        base = identity_of(checkpoint, progress)
        reduction = None if size == FULL else Reduction(checkpoint, index, size, base)
        kept = size if record is None or reduction else _merged_size(checkpoint, record)
        once = "" if reduction is None else uuid4().hex
        plan = json.dumps([index, base.digest, fingerprint(checkpoint.files()), str(kept), once])
        with Job(target, plan) as job:
            pieces = _package_pieces(checkpoint, index, kept, reduction)
            written = job.write_file(WEIGHTS_NAME, pieces, digests=True, progress=progress)
            manifest, text, signature = _manifest(
                statement, record, base, written, kept, recomputed=reduction is not None
            )
            job.write_text(MANIFEST_NAME, text)
            if signature := private.sign(text) if private else signature:
                job.write_text(SIGNATURE_NAME, signature)
            job.finish()
    if reduction is not None:
        on_errors(reduction.errors())
    return manifest


def extract_anchor(source: Path, target: Path, *, shard_bytes: int = SHARD_BYTES, progress: Progress = silent) -> None:
    """Write the public part of a checkpoint as a checkpoint with one expert.

    Raises:
        LayoutError: ``source`` is no checkpoint.
        OutputRefused: ``target`` exists or cannot be written.
    """
    with CheckpointReader(source) as checkpoint:
        one = {**checkpoint.config, "num_experts": 1, "num_experts_per_tok": 1}
        plan = json.dumps(["anchor", shard_bytes, fingerprint(checkpoint.files())])
        public, *_ = expert_entries(source, checkpoint.architecture.num_experts)
        with Job(target, plan) as job:
            pieces = anchor_pieces(checkpoint)
            write_model(job, one, pieces, beside=source, shard_bytes=shard_bytes, progress=progress)
            job.write_text(MODEL_MANIFEST, to_json(model_manifest((), None, public)))
            job.finish()


def anchor_pieces(checkpoint: CheckpointReader) -> dict[str, Piece]:
    """Every tensor of the public part, as of a checkpoint with one expert."""
    architecture = checkpoint.architecture
    whole = (*shared_keys(architecture), *expert_keys(architecture, 0))
    first = (*router_keys(architecture), *(key for key in bias_keys(architecture) if key in checkpoint))
    return {key: _rows(checkpoint, key) for key in whole} | {key: _rows(checkpoint, key, 0) for key in first}


def _package_pieces(
    checkpoint: CheckpointReader, index: int, size: ExpertSize, reduction: Reduction | None
) -> dict[str, Piece]:
    pieces: dict[str, Piece] = {}
    biased = _is_biased(checkpoint, index)
    for layer in range(checkpoint.architecture.num_hidden_layers):
        pieces |= _ffn_pieces(checkpoint, index, size, layer) if reduction is None else reduction.pieces(layer)
        row = _rows(checkpoint, ROUTER_KEY.format(layer=layer), index)
        pieces[ROW_KEY.format(layer=layer)] = Piece(row.dtype, row.shape[1:], row.chunks)
        if biased:
            pieces[BIAS_KEY.format(layer=layer)] = _rows(checkpoint, ROUTER_BIAS_KEY.format(layer=layer), index)
    return pieces


def _ffn_pieces(checkpoint: CheckpointReader, index: int, size: ExpertSize, layer: int) -> dict[str, Piece]:
    """The FFN as it is, or without the zeros with which a narrow one was merged."""
    shapes = size.ffn_shapes(BaseArchitecture.of(checkpoint.architecture))
    keys = [key.format(layer=layer, expert=index) for key in EXPERT_KEYS]
    if size.width is None:
        return {name.format(layer=layer): _rows(checkpoint, key) for name, key in zip(shapes, keys, strict=True)}
    return {
        name.format(layer=layer): Piece(checkpoint.dtype, shape, partial(_trimmed, checkpoint, key, shape))
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }


def _trimmed(checkpoint: CheckpointReader, key: str, shape_OI: tuple[int, int]) -> tuple[memoryview]:
    outputs, inputs = shape_OI
    whole_OI = checkpoint.read(key)
    if whole_OI[outputs:].any() or whole_OI[:, inputs:].any():
        raise LayoutError(
            f"{key} is not zero beyond the width at which its expert was merged: give --statement to extract it whole"
        )
    return (tensor_bytes(whole_OI[:outputs, :inputs]),)


def _merged_size(checkpoint: CheckpointReader, record: Record) -> ExpertSize:
    """The size of the package that an expert was merged from; raises ``LayoutError`` where it cannot be restored."""
    size = record.manifest.size
    if size.rank is not None:
        raise LayoutError(
            f"expert {record.manifest.id!r} of {checkpoint.directory} was merged from a package of {size}, whose "
            f"factors a checkpoint does not keep: give --rank {size.rank} to compute others, or --statement to "
            "extract it as a full expert"
        )
    size.check(BaseArchitecture.of(checkpoint.architecture))
    return size


def _rows(checkpoint: CheckpointReader, key: str, row: int | None = None) -> Piece:
    """A whole tensor, or one of its rows as a tensor with one row."""
    info = checkpoint.info(key)
    if row is None:
        return Piece(info.dtype, info.shape, partial(checkpoint.chunks, key))
    return Piece(info.dtype, (1, *info.shape[1:]), partial(checkpoint.chunks, key, row, 1))


def _is_biased(checkpoint: CheckpointReader, index: int) -> bool:
    """Whether any layer gives this expert a bias that is not zero in every bit."""
    keys = [key for key in bias_keys(checkpoint.architecture) if key in checkpoint]
    return any(any(chunk) for key in keys for chunk in checkpoint.chunks(key, index, 1))


def _record(checkpoint: CheckpointReader, index: int, statement: Statement | None) -> Record | None:
    if statement is not None:
        return None
    source = checkpoint.directory
    expert = expert_entries(source, checkpoint.architecture.num_experts)[index]["id"]
    record = read_record(source, expert)
    if record is None:
        raise ManifestInvalid(f"{source} does not record who made expert {expert!r}: give a statement")
    return record


def _manifest(
    statement: Statement | None,
    record: Record | None,
    base: BaseIdentity,
    written: Written,
    size: ExpertSize,
    *,
    recomputed: bool,
) -> tuple[Manifest, bytes, bytes | None]:
    """The manifest, its bytes, and the signature that it had where it is restored byte for byte.

    What was measured of an expert says nothing of recomputed weights, and is left out there.
    """
    if record is None:
        if statement is None:
            raise ManifestInvalid("a package needs a statement")
        manifest = complete(statement, base, written, size)
        return manifest, manifest.to_json(), None
    mine = {name: value for name, value in record.manifest if name in Statement.model_fields}
    if recomputed or size != record.manifest.size:
        del mine["evaluation"]
    manifest = complete(Statement(**mine), base, written, size)
    if manifest == record.manifest:
        return manifest, record.text, record.signature
    return manifest, manifest.to_json(), None
