"""A public model with one expert, trained from nothing on a folder of public texts, its tokenizer included."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch
from torch import Tensor, nn

from flexgate.experts.checkpoint.layout import Architecture
from flexgate.experts.checkpoint.shards import to_json, write_model
from flexgate.experts.errors import TrainingRefused
from flexgate.experts.io.output import require_absent
from flexgate.experts.io.stream import Job, Piece, one_chunk
from flexgate.experts.io.tensorfile import DTYPE_NAMES, tensor_bytes
from flexgate.experts.package.provenance import MODEL_MANIFEST, PUBLIC, model_manifest
from flexgate.experts.training.batches import Batch, Example
from flexgate.experts.training.encoding import Encoder, make_tokenizer, split
from flexgate.experts.training.loop import Outcome, Plan, Run
from flexgate.experts.training.model import FlexOlmo
from flexgate.experts.training.objective import initialise, weighted_loss
from flexgate.experts.training.routing import key_loss, reserve_channels
from flexgate.experts.training.texts import read_documents
from flexgate.experts.training.train_expert import digest, samples


@dataclass(frozen=True)
class Channels:
    """Routing channels of a new model (see ``routing``), and what reading a prompt's keys from them weighs."""

    count: int
    first_expert_layer: int
    key_weight: float


@dataclass(frozen=True)
class AnchorOptions:
    """Sizes of a new public model; ``dtype`` is what it is stored as."""

    plan: Plan = field(default=Plan(peak=3e-3, prompt_weight=1.0))
    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 256
    layers: int = 4
    heads: int = 4
    length: int = 512
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    channels: Channels | None = None

    def architecture(self) -> Architecture:
        """The numbers of ``config.json``; raises ``TrainingRefused``."""
        if min(self.hidden_size, self.intermediate_size, self.layers, self.heads) < 1 or self.length < 2:
            raise TrainingRefused("sizes of a model are at least 1, its length at least 2")
        if self.hidden_size % (2 * self.heads):
            raise TrainingRefused(f"hidden size {self.hidden_size} must be a multiple of twice the {self.heads} heads")
        return Architecture(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            num_experts=1,
            num_experts_per_tok=1,
            max_position_embeddings=self.length,
        )


def train_anchor(texts: Path, target: Path, options: AnchorOptions) -> Outcome:
    """Train a public model on ``texts`` and write the checkpoint ``target``.

    The router row becomes the mean hidden state of the public text in every layer, of length 1. The work is kept in
    ``.NAME.training`` beside the target until the checkpoint is written; the same command goes on from there.

    Raises:
        TextsInvalid: texts that nothing can be trained with.
        TrainingRefused: options that do not fit.
        OutputRefused: ``target`` exists or cannot be written.
    """
    require_absent(target)
    model = FlexOlmo(options.architecture())
    documents = read_documents(texts)
    tokenizer = make_tokenizer(documents, options.vocab_size, options.length)
    if len(tokenizer) > options.vocab_size:
        raise TrainingRefused(f"vocab_size is {options.vocab_size}; bytes and marks alone take {len(tokenizer)}")
    encoder = Encoder(tokenizer, tokenizer.eos_token_id, tokenizer.pad_token_id)
    train, held = split(encoder.encode(documents, options.length), options.plan.seed, texts)
    work = target.with_name(f".{target.name}.training")
    outcome = fit_anchor(model, options, work, encoder.pad_id).run(train, held, f"{options} {digest(train)}")
    _set_public_rows(model, train, options.plan, encoder.pad_id)
    with tempfile.TemporaryDirectory() as beside:
        tokenizer.save_pretrained(beside)
        write_anchor(target, model, options.dtype, encoder.eos_id, encoder.pad_id, Path(beside))
    shutil.rmtree(work, ignore_errors=True)
    return outcome


def fit_anchor(model: FlexOlmo, options: AnchorOptions, work: Path, pad_id: int) -> Run:
    """The training of a new model from its seeded start; router rows are not part of it."""
    initialise(model, options.plan.seed)
    parameters = {name: value for name, value in model.named_parameters() if not name.endswith("mlp.gate.weight")}
    if options.channels is None:
        return Run(parameters, partial(answer_loss, model), options.plan, work, name="anchor", pad_id=pad_id)
    count, first = options.channels.count, options.channels.first_expert_layer
    reserve_channels(model, count, first)
    torch.manual_seed(options.plan.seed)
    head = nn.Linear(count, options.vocab_size)
    return Run(
        parameters | {f"keys.{name}": value for name, value in head.named_parameters()},
        partial(_loss_with_keys, model, head, options.channels),
        options.plan,
        work,
        name="anchor",
        pad_id=pad_id,
        after_step=partial(reserve_channels, model, count, first),
    )


def answer_loss(model: FlexOlmo, batch: Batch) -> Tensor:
    """Next-token loss from a batch."""
    return weighted_loss(model, model.hidden(batch.tokens_BT), batch)


def _loss_with_keys(model: FlexOlmo, head: nn.Linear, channels: Channels, batch: Batch) -> Tensor:
    taps: list[Tensor] = []
    loss = weighted_loss(model, model.hidden(batch.tokens_BT, taps=taps), batch)
    if not batch.keys_BT.any():
        return loss
    return loss + channels.key_weight * key_loss(head, taps[channels.first_expert_layer], batch)


@torch.no_grad()
def _set_public_rows(model: FlexOlmo, examples: list[Example], plan: Plan, pad_id: int) -> None:
    seen = samples(model, examples, plan, pad_id)
    for layer, inputs_NH in zip(model.model.blocks, seen.inputs_LNH, strict=True):
        mean_H = inputs_NH.mean(0)
        layer.mlp.gate.weight[0] = mean_H / mean_H.norm().clamp(min=1e-12)


def write_anchor(
    target: Path,
    model: FlexOlmo,
    dtype: Literal["float32", "bfloat16"],
    eos_id: int,
    pad_id: int,
    beside: Path,
    public: dict[str, Any] = PUBLIC,
) -> None:
    """Write the checkpoint ``target`` with the tokenizer's files that lie in ``beside``.

    Raises:
        OutputRefused: ``target`` exists or cannot be written.
    """
    tensors = {name: value.detach().to(getattr(torch, dtype)) for name, value in model.state_dict().items()}
    pieces = {
        name: Piece(DTYPE_NAMES[dtype], tuple(tensor.shape), one_chunk(tensor_bytes(tensor)))
        for name, tensor in tensors.items()
    }
    config = model.architecture.to_config(eos_token_id=eos_id, pad_token_id=pad_id, dtype=dtype)
    with Job(target, uuid4().hex) as job:
        write_model(job, config, pieces, beside=beside)
        job.write_text(MODEL_MANIFEST, to_json(model_manifest((), None, public)))
        job.finish()
