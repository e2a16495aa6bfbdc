"""From a folder of texts to an expert package.

An owner sees its own and public text, never another owner's. Public text serves twice: to tell own from public where
the router is fitted, and mixed into the training, so that the expert stays harmless on text that is not its own.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import Final, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flexgate.experts.checkpoint.base import BaseArchitecture, BaseIdentity, base_identity
from flexgate.experts.checkpoint.layout import CONFIG_NAME, ROUTER_BIAS_KEY, Architecture
from flexgate.experts.checkpoint.reader import CheckpointReader, read_checkpoint, read_json
from flexgate.experts.errors import TrainingRefused
from flexgate.experts.io.output import require_absent
from flexgate.experts.io.tensorfile import DTYPES
from flexgate.experts.package.manifest import Figure, Manifest, Statement
from flexgate.experts.package.signature import read_private_key
from flexgate.experts.package.size import ExpertSize
from flexgate.experts.package.write import write_package
from flexgate.experts.training.batches import Batch, Example, batches
from flexgate.experts.training.encoding import Encoder, split
from flexgate.experts.training.loop import Outcome, Plan, Run
from flexgate.experts.training.low_rank import use_factors
from flexgate.experts.training.model import FlexOlmo
from flexgate.experts.training.objective import language_loss
from flexgate.experts.training.pair import (
    Row,
    expert_layers,
    make_pair,
    make_sharded_pair,
    public_rows,
    rows_from_discriminant,
    rows_from_embedding,
    rows_from_mean,
    trainable,
    z_loss,
)
from flexgate.experts.training.parallel import ALONE, World, shard, shard_of
from flexgate.experts.training.routing import Samples, collect
from flexgate.experts.training.texts import read_documents

Z_WEIGHT: Final = 1e-3
ROUTER_BATCHES: Final = 24
"""Batches of own and of public text that router rows are computed from."""


@dataclass(frozen=True)
class RouterOptions:
    """How the owner's router row starts, and whether it trains with the expert."""

    start: Literal["discriminant", "mean-hidden", "embedding"] = "discriminant"
    embedding: Path | None = None
    train: bool = False
    sharpness: float = 1.0
    decay: float = 1e-3


@dataclass(frozen=True)
class ExpertOptions:
    """``layers`` of None trains the FFN of every layer; ``public_share`` is public text's part of the training.

    With a ``rank``, the FFN is the public one plus factors of this rank, which alone train.
    """

    plan: Plan = field(default=Plan())
    router: RouterOptions = field(default=RouterOptions())
    length: int = 512
    layers: tuple[int, ...] | None = None
    public_share: float = 0.25
    rank: int | None = None

    @property
    def size(self) -> ExpertSize:
        """How much of an expert is trained."""
        return ExpertSize(rank=self.rank)


@dataclass(frozen=True)
class Texts:
    """Examples of one training."""

    own: list[Example]
    held_out: list[Example]
    public: list[Example]
    pad_id: int
    documents: int
    """The owner's."""


def train_expert(
    anchor: Path,
    own: Path,
    public: Path | None,
    target: Path,
    statement: Statement,
    options: ExpertOptions,
    *,
    key: Path | None = None,
    world: World = ALONE,
) -> tuple[Manifest, Outcome]:
    """Train an expert on the texts in ``own`` against ``anchor`` and write the package ``target``.

    The work is kept in ``.NAME.training`` beside the target until the package is written; the same command goes on
    from there, on as many processes as it likes. Of the processes of ``world``, all of which call this, the first
    writes.

    Raises:
        TextsInvalid: texts or tokenizer that nothing can be trained with.
        TrainingRefused: options that do not fit.
        SizeInvalid: no expert of this model has this rank.
        LayoutError: ``anchor`` is no checkpoint with one expert.
        OutputRefused: ``target`` exists or cannot be written.
    """
    world.meet()

    def prepare() -> tuple[FlexOlmo, BaseIdentity, Texts]:
        require_absent(target)
        model = load_anchor(anchor, world.mesh)
        _check(options, model.architecture, public, world)
        if key is not None:
            read_private_key(key)
        base = base_identity(anchor)
        texts = _read(anchor, own, public, options, model.architecture)
        require_rows(options.plan, texts, world.size)
        return model, base, texts

    model, base, texts = world.agreed(prepare)
    rows = world.agreed(lambda: _rows(options, model, texts))
    pair = make_pair(model, rows) if world.mesh is None else make_sharded_pair(model, rows, world.mesh)
    if options.rank is not None:
        use_factors(pair, options.rank, options.plan.seed)
    work = target.with_name(f".{target.name}.training")
    examples = _mixed(texts, options)
    run = _run(pair, options, work, statement.id, texts.pad_id, world)
    outcome = run.run(examples, texts.held_out, f"{base.digest} {options} {digest(examples)}")
    measured = _measured(statement, options, texts, outcome)
    layers = [layer for layer in expert_layers(pair, DTYPES[base.dtype]) if world.first]
    manifest = world.once(lambda: write_package(target, measured, base, layers, key=key, size=options.size))
    if world.first:
        shutil.rmtree(work, ignore_errors=True)
    return manifest, outcome


def load_anchor(directory: Path, mesh: DeviceMesh | None = None) -> FlexOlmo:
    """A public model, sharded over ``mesh`` if there is one.

    Raises:
        LayoutError: ``directory`` holds no checkpoint.
        TrainingRefused: the model has other experts already.
    """
    if mesh is not None:
        return _load_shards(directory, mesh)
    architecture, tensors = read_checkpoint(directory)
    _require_anchor(directory, architecture)
    return FlexOlmo.from_tensors(architecture, tensors)


def _load_shards(directory: Path, mesh: DeviceMesh) -> FlexOlmo:
    """Read one tensor after the other and keep this process's shard."""
    with CheckpointReader(directory) as checkpoint:
        _require_anchor(directory, checkpoint.architecture)
        if checkpoint.architecture.tie_word_embeddings:
            raise TrainingRefused(f"{directory} has tied embeddings: train against it in one process")
        with torch.device("meta"):
            model = FlexOlmo(checkpoint.architecture, biased=ROUTER_BIAS_KEY.format(layer=0) in checkpoint)
        shard(model, mesh)
        parts = {name: shard_of(checkpoint.read(name).float(), mesh) for name, _ in checkpoint.infos()}
        model.load_state_dict(parts, assign=True)
    return model.requires_grad_(False)


def _require_anchor(directory: Path, architecture: Architecture) -> None:
    if architecture.num_experts != 1:
        raise TrainingRefused(
            f"{directory} has {architecture.num_experts} experts; train against its anchor ('experts extract … public')"
        )


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 of what is trained on."""
    return hashlib.sha256(repr(examples).encode()).hexdigest()


def _check(options: ExpertOptions, architecture: Architecture, public: Path | None, world: World) -> None:
    router, layers = options.router, options.layers
    options.size.check(BaseArchitecture.of(architecture))
    if options.rank is not None and world.mesh is not None:
        raise TrainingRefused("a rank is trained in one process: start the command without torchrun")
    if router.start == "discriminant" and public is None:
        raise TrainingRefused(
            "a discriminant tells own from public text: give public texts, or start from 'mean-hidden'"
        )
    if (router.start == "embedding") != (router.embedding is not None):
        raise TrainingRefused("an embedding file goes with the start 'embedding', and only with it")
    if not 0 <= options.public_share < 1:
        raise TrainingRefused(f"the public share is {options.public_share}, expected at least 0 and below 1")
    if layers is not None and not (layers and set(layers) <= set(range(architecture.num_hidden_layers))):
        raise TrainingRefused(f"layers are {layers}, the model has 0 to {architecture.num_hidden_layers - 1}")
    if options.length < 2:
        raise TrainingRefused(f"the length is {options.length}, expected at least 2 tokens")


def require_rows(plan: Plan, texts: Texts, processes: int) -> None:
    """Raise ``TrainingRefused`` unless a step has a row for every process, however long its rows are."""
    longest = max(len(example.ids) for example in (*texts.own, *texts.public))
    if processes > 1 and processes * longest > plan.tokens_per_batch:
        raise TrainingRefused(
            f"a step of {plan.tokens_per_batch} tokens has no piece of {longest} for each of {processes} processes: "
            f"take {processes * longest} tokens per batch, or start at most {plan.tokens_per_batch // longest or 1}"
        )


def _read(anchor: Path, own: Path, public: Path | None, options: ExpertOptions, architecture: Architecture) -> Texts:
    encoder = Encoder.from_model(anchor, read_json(anchor / CONFIG_NAME))
    length, seed = min(options.length, architecture.max_position_embeddings), options.plan.seed
    documents = read_documents(own)
    train, held = split(encoder.encode(documents, length), seed, own)
    other = [] if public is None else split(encoder.encode(read_documents(public), length), seed, public)[0]
    return Texts(train, held, other, encoder.pad_id, len(documents))


def _rows(options: ExpertOptions, model: FlexOlmo, texts: Texts) -> list[Row]:
    router = options.router
    public = public_rows(model)
    if router.embedding is not None:
        return rows_from_embedding(router.embedding, public)
    own = samples(model, texts.own, options.plan, texts.pad_id)
    if router.start == "mean-hidden":
        return rows_from_mean(own, public)
    other = samples(model, texts.public, options.plan, texts.pad_id)
    return rows_from_discriminant(own, other, public, decay=router.decay, sharpness=router.sharpness)


def samples(model: FlexOlmo, examples: Sequence[Example], plan: Plan, pad_id: int) -> Samples:
    """What the anchor's routers see on some batches of ``examples``."""
    stream = batches(
        examples,
        tokens_per_batch=plan.tokens_per_batch,
        pad_id=pad_id,
        prompt_weight=plan.prompt_weight,
        seed=plan.seed,
    )
    return collect(model, islice(stream, ROUTER_BATCHES))


def _mixed(texts: Texts, options: ExpertOptions) -> list[Example]:
    """The owner's examples and, at random, as many public ones as make up their share."""
    share = options.public_share
    wanted = min(len(texts.public), round(len(texts.own) * share / (1 - share)))
    return [*texts.own, *Random(options.plan.seed).sample(texts.public, wanted)]


def _run(pair: FlexOlmo, options: ExpertOptions, work: Path, name: str, pad_id: int, world: World) -> Run:
    layers = range(pair.architecture.num_hidden_layers) if options.layers is None else options.layers
    parameters = trainable(pair, list(layers), train_router=options.router.train)

    def loss_of(batch: Batch) -> Tensor:
        loss = language_loss(pair.lm_head(pair.hidden(batch.tokens_BT)), batch)
        return loss + Z_WEIGHT * z_loss(pair, batch) if options.router.train else loss

    return Run(parameters, loss_of, options.plan, work, name=name, pad_id=pad_id, world=world)


def _measured(statement: Statement, options: ExpertOptions, texts: Texts, outcome: Outcome) -> Statement:
    """The statement with what this training knows better than its author."""
    plan, router = options.plan, options.router
    recipe = {
        "steps": str(outcome.steps),
        "peak_rate": f"{plan.peak:g}",
        "seed": str(plan.seed),
        "arithmetic": plan.arithmetic,
        "router_start": router.start,
        "router_trained": "with the expert" if router.train else "no",
        "public_share": f"{options.public_share:g}",
        "layers": "all" if options.layers is None else " ".join(map(str, options.layers)),
        **({} if options.rank is None else {"rank": str(options.rank)}),
    }
    training = statement.training.model_copy(
        update={
            "documents": texts.documents,
            "tokens": outcome.tokens,
            "router": "own",
            "recipe": statement.training.recipe | recipe,
        }
    )
    loss = Figure(name="held_out_loss", value=outcome.held_out_loss, unit="nats per token", on="held-out own text")
    return statement.model_copy(update={"training": training, "evaluation": (*statement.evaluation, loss)})
