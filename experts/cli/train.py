"""``flexgate experts train-anchor``, ``train`` and ``tune-router``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flexgate.experts.cli.support import Json, KeyOption, read_statement, reported

if TYPE_CHECKING:
    from flexgate.experts.training.loop import Plan

Steps = Annotated[int, typer.Option(help="Maximum number of optimizer steps.")]
Peak = Annotated[float, typer.Option(help="Highest learning rate.")]
Tokens = Annotated[int, typer.Option(help="Tokens per step.")]
Seed = Annotated[int, typer.Option(help="Random seed. The same seed, texts and machine give the same bits.")]
Length = Annotated[int, typer.Option(help="Maximum length of a sequence, in tokens; longer texts are split.")]
Save = Annotated[int, typer.Option(help="Steps between checkpoints of the run; a killed run loses at most this many.")]
Evaluate = Annotated[int, typer.Option(help="Steps between evaluations on held-out text.")]
Patience = Annotated[int, typer.Option(help="Early stopping: evaluations without improvement; 0 disables it.")]
Arithmetic = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Data type of the forward pass.")]


def _plan(given: Mapping[str, Any]) -> Plan:
    """The plan among a command's options, which are named like its fields; raises ``TrainingRefused``."""
    from flexgate.experts.training.loop import Plan

    return Plan(**{field.name: given[field.name] for field in fields(Plan) if field.name in given})


def _require_one_process() -> None:
    """Raises ``TrainingRefused``."""
    from flexgate.experts.errors import TrainingRefused

    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise TrainingRefused(
            "this command trains in one process: start it without torchrun (only 'train' supports it)"
        )


def train_anchor(
    texts: Annotated[Path, typer.Argument(help="Folder of public *.txt, *.md and *.jsonl.")],
    target: Annotated[Path, typer.Argument(help="Checkpoint folder to write.")],
    vocab_size: Annotated[
        int, typer.Option(help="Vocabulary size of the tokenizer, which is learnt from the texts.")
    ] = 1024,
    hidden_size: Annotated[int, typer.Option(help="Width of the model.")] = 128,
    intermediate_size: Annotated[int, typer.Option(help="Width of the feed-forward layers.")] = 256,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 4,
    heads: Annotated[int, typer.Option(help="Number of attention heads.")] = 4,
    length: Length = 512,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Data type of the checkpoint.")] = "bfloat16",
    steps: Steps = 1200,
    peak: Peak = 3e-3,
    tokens_per_batch: Tokens = 2500,
    seed: Seed = 0,
    save_every: Save = 50,
    evaluate_every: Evaluate = 50,
    patience: Patience = 0,
    arithmetic: Arithmetic = "float32",
    as_json: Json = False,
) -> None:
    """Train a small public model from nothing. A killed run resumes when started again."""
    given = dict(locals())
    with reported(as_json) as show:
        _require_one_process()
        from flexgate.experts.training.train_anchor import AnchorOptions
        from flexgate.experts.training.train_anchor import train_anchor as run

        plan = _plan(given | {"prompt_weight": 1.0})
        sizes = AnchorOptions(plan, vocab_size, hidden_size, intermediate_size, layers, heads, length, dtype)
        outcome = run(texts, target, sizes)
        show({"anchor": str(target), **vars(outcome)})


def train(
    anchor: Annotated[Path, typer.Argument(help="Checkpoint of the public model.")],
    texts: Annotated[Path, typer.Argument(help="Folder of the owner's *.txt, *.md and *.jsonl.")],
    target: Annotated[Path, typer.Argument(help="Package folder to write.")],
    statement: Annotated[Path, typer.Option(help="JSON file: id, owner, domain, training.data, licence.")],
    public: Annotated[Path | None, typer.Option(help="Folder of public texts.", show_default=False)] = None,
    key: KeyOption = None,
    router: Annotated[
        Literal["discriminant", "mean-hidden", "embedding"], typer.Option(help="Initial value of the router row.")
    ] = "discriminant",
    embedding: Annotated[
        Path | None, typer.Option(help="NumPy file with the domain's embedding; required with --router embedding.")
    ] = None,
    train_router: Annotated[bool, typer.Option(help="Also train the router row and bias.")] = False,
    sharpness: Annotated[float, typer.Option(help="With --router discriminant: scale of the row that it fits.")] = 1.0,
    public_share: Annotated[
        float, typer.Option(help="Fraction of public text in the training, from 0 to below 1.")
    ] = 0.25,
    layer: Annotated[
        list[int] | None, typer.Option(help="Train only the FFN of this layer; may be repeated. Default: all layers.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Train only a difference of this rank to the public FFN. Default: a full FFN.")
    ] = None,
    length: Length = 512,
    steps: Steps = 400,
    peak: Peak = 9e-4,
    tokens_per_batch: Tokens = 2048,
    prompt_weight: Annotated[float, typer.Option(help="Weight of the loss on prompts, relative to answers.")] = 0.2,
    seed: Seed = 0,
    save_every: Save = 50,
    evaluate_every: Evaluate = 50,
    patience: Patience = 5,
    arithmetic: Arithmetic = "float32",
    as_json: Json = False,
) -> None:
    """Train an expert on an owner's texts, which are not copied. A killed run resumes when started again."""
    given = dict(locals())
    from flexgate.experts.training.parallel import joined, lost_process_reported

    with joined() as world, reported(as_json, quiet=not world.first) as show, lost_process_reported():
        from flexgate.experts.training.train_expert import ExpertOptions, RouterOptions, train_expert

        plan = _plan(given)
        start = RouterOptions(router, embedding, train_router, sharpness)
        options = ExpertOptions(plan, start, length, tuple(layer) if layer else None, public_share, rank)
        written = world.agreed(lambda: read_statement(statement))
        manifest, outcome = train_expert(anchor, texts, public, target, written, options, key=key, world=world)
        made = {"package": str(target), "id": manifest.id, "size": str(manifest.size)}
        show({**made, **vars(outcome), "base": manifest.base.digest})


def tune_router(
    model: Annotated[Path, typer.Argument(help="Merged checkpoint.")],
    texts: Annotated[Path, typer.Argument(help="Folder of public *.txt, *.md and *.jsonl.")],
    target: Annotated[Path, typer.Argument(help="Checkpoint folder to write.")],
    length: Length = 512,
    steps: Steps = 200,
    peak: Peak = 9e-4,
    tokens_per_batch: Tokens = 2048,
    prompt_weight: Annotated[float, typer.Option(help="Weight of the loss on prompts, relative to answers.")] = 0.2,
    seed: Seed = 0,
    save_every: Save = 50,
    evaluate_every: Evaluate = 50,
    patience: Patience = 5,
    arithmetic: Arithmetic = "float32",
    as_json: Json = False,
) -> None:
    """Train the routers of a merged checkpoint on public texts.

    The result is marked: excluding an expert from it no longer equals never having merged the expert.
    """
    given = dict(locals())
    with reported(as_json) as show:
        _require_one_process()
        from flexgate.experts.training.tune_router import tune_router as run

        plan = _plan(given)
        outcome = run(model, texts, target, plan, length=length)
        show({"model": str(target), "strictly_separable": False, **vars(outcome)})
