"""Router tuning (FlexOlmo, section 3.4): after a merge, the routers alone learn from public proxy text.

Optional, and at a price: every row changes with signal from every owner's expert, so taking an expert out no longer
gives the model that never had it. The tuned checkpoint says so: ``strictly_separable`` is false and every router is
``joint``. Owners' signatures are left behind, for they signed other rows.

The public row stays as it is, which costs nothing: a softmax does not change when the same vector is added to every
row. So the base model stays the same, and packages made for it still fit.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from flexgate.experts.checkpoint.layout import CONFIG_NAME
from flexgate.experts.checkpoint.reader import CheckpointReader, read_checkpoint, read_json
from flexgate.experts.checkpoint.shards import to_json, write_model
from flexgate.experts.errors import TrainingRefused
from flexgate.experts.io.output import require_absent
from flexgate.experts.io.stream import Job, Piece, fingerprint, one_chunk
from flexgate.experts.io.tensorfile import DTYPES, tensor_bytes
from flexgate.experts.package.provenance import (
    FOLDER,
    MODEL_MANIFEST,
    expert_entries,
    joint,
    joint_manifest,
    read_record,
)
from flexgate.experts.training.batches import Example
from flexgate.experts.training.encoding import Encoder, split
from flexgate.experts.training.loop import Outcome, Plan, Run
from flexgate.experts.training.model import FlexOlmo
from flexgate.experts.training.objective import language_loss
from flexgate.experts.training.texts import read_documents

ROUTER: Final = "mlp.gate.weight"


def tune_router(model: Path, texts: Path, target: Path, plan: Plan, *, length: int) -> Outcome:
    """Write ``target``: the merged checkpoint ``model`` with routers trained on ``texts``.

    The work is kept in ``.NAME.training`` beside the target; the same command goes on from there.

    Raises:
        LayoutError: ``model`` is no checkpoint.
        TextsInvalid: texts or tokenizer that nothing can be trained with.
        TrainingRefused: ``model`` has one expert.
        OutputRefused: ``target`` exists or cannot be written.
    """
    require_absent(target)
    architecture, tensors = read_checkpoint(model)
    if architecture.num_experts < 2:
        raise TrainingRefused(f"{model} has one expert: there is nothing to route")
    encoder = Encoder.from_model(model, read_json(model / CONFIG_NAME))
    examples = encoder.encode(read_documents(texts), min(length, architecture.max_position_embeddings))
    train, held = split(examples, plan.seed, texts)
    tuned = FlexOlmo.from_tensors(architecture, tensors)
    work = target.with_name(f".{target.name}.training")
    outcome = fit_routers(tuned, train, held, plan, work, pad_id=encoder.pad_id)
    _write(model, tuned, target)
    shutil.rmtree(work, ignore_errors=True)
    return outcome


def fit_routers(
    model: FlexOlmo, train: Sequence[Example], held: Sequence[Example], plan: Plan, work: Path, *, pad_id: int
) -> Outcome:
    """Train every router row of ``model`` but the public one, in place, with the language-model loss."""
    named = thaw_routers(model)
    run = Run(
        named, lambda batch: language_loss(model(batch.tokens_BT), batch), plan, work, name="router", pad_id=pad_id
    )
    sums = [_digest(value) for value in model.state_dict().values()]
    return run.run(train, held, hashlib.sha256(repr((sums, train)).encode()).hexdigest())


def thaw_routers(model: FlexOlmo) -> dict[str, nn.Parameter]:
    """Freeze all but the routers' rows after the first, and name them. Biases stay: they may not rise above zero."""
    model.requires_grad_(False)
    named = {name: value for name, value in model.named_parameters() if name.endswith(ROUTER)}
    for value in named.values():
        value.requires_grad_()
        value.register_hook(_without_public)
    return named


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def _without_public(gradient: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(gradient[:1]), gradient[1:]))


def _write(model: Path, tuned: FlexOlmo, target: Path) -> None:
    routers = {name: value.detach() for name, value in tuned.named_parameters() if name.endswith(ROUTER)}
    with CheckpointReader(model) as checkpoint:
        pieces = dict(_pieces(checkpoint, routers))
        plan = json.dumps([fingerprint(checkpoint.files()), [_digest(routers[name]) for name in sorted(routers)]])
        with Job(target, plan) as job:
            write_model(job, checkpoint.config, pieces, beside=model)
            _write_provenance(job, model, checkpoint.architecture.num_experts)
            job.finish()


def _pieces(checkpoint: CheckpointReader, routers: dict[str, Tensor]) -> Iterable[tuple[str, Piece]]:
    for name, info in checkpoint.infos():
        if name not in routers:
            yield name, Piece(info.dtype, info.shape, partial(checkpoint.chunks, name))
            continue
        value = routers[name].to(DTYPES[info.dtype])
        yield name, Piece(info.dtype, tuple(value.shape), one_chunk(tensor_bytes(value)))


def _write_provenance(job: Job, model: Path, count: int) -> None:
    kept = {entry["id"]: read_record(model, entry["id"]) for entry in expert_entries(model, count)}
    records = {expert: joint(record) for expert, record in kept.items() if record is not None}
    for expert, record in records.items():
        job.write_text(f"{FOLDER}/{expert}.json", record.text)
    job.write_text(MODEL_MANIFEST, to_json(joint_manifest(model, records, count)))
