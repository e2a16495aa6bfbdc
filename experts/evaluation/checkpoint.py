"""The opt-out matrix of any merged checkpoint, on texts that nobody trained on.

The texts lie in one folder per expert, named by its id (``public`` for the anchor): ``*.txt``, ``*.md`` and ``*.jsonl``
as for training. Every text counts for perplexity; a ``{"prompt", "answer"}`` is a probe as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from flexgate.experts.checkpoint.layout import CONFIG_NAME
from flexgate.experts.checkpoint.reader import read_checkpoint, read_json
from flexgate.experts.errors import EvaluationRefused
from flexgate.experts.evaluation.gates import opt_out_gates
from flexgate.experts.evaluation.markdown import percent, scaled, table
from flexgate.experts.evaluation.measure import DomainTexts, Figures, measure, routing_accuracy
from flexgate.experts.evaluation.predict import gated
from flexgate.experts.package.provenance import expert_entries, strictly_separable
from flexgate.experts.training.encoding import Encoder
from flexgate.experts.training.model import FlexOlmo
from flexgate.experts.training.texts import read_documents


def evaluate_checkpoint(
    directory: Path, texts: Path, *, length: int, progress: Callable[[int], None] = lambda _count: None
) -> dict[str, Any]:
    """Every gate of the matrix, and for every layer how often a domain's tokens lead to its own expert.

    Args:
        length: longest piece of text, in tokens.
        progress: called after each gate.

    Raises:
        LayoutError: ``directory`` is no checkpoint.
        TextsInvalid: texts that cannot be read.
        EvaluationRefused: a folder that belongs to no expert, or none at all.
    """
    architecture, tensors = read_checkpoint(directory)
    experts = [entry["id"] for entry in expert_entries(directory, architecture.num_experts)]
    encoder = Encoder.from_model(directory, read_json(directory / CONFIG_NAME))
    domains = _read(texts, experts, encoder, min(length, architecture.max_position_embeddings))
    model = FlexOlmo.from_tensors(architecture, tensors)
    rows = {}
    for name, allowed in opt_out_gates(experts).items():
        rows[name] = _row(measure(gated(model, allowed), domains, encoder.pad_id))
        progress(1)
    return {
        "model": directory.name,
        "experts": experts,
        "strictly_separable": strictly_separable(directory),
        "texts": {name: {"texts": len(each.held_out), "probes": len(each.probes)} for name, each in domains.items()},
        "rows": rows,
        "routing_accuracy": {
            name: routing_accuracy(model, experts.index(name), each.held_out, encoder.pad_id)
            for name, each in domains.items()
        },
    }


def report(found: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    domains = list(found["texts"])
    parts = []
    for title, kind, show in (
        ("Exact answers, %", "accuracy", percent),
        ("Perplexity", "perplexity", lambda value: scaled(value, 1, 2)),
    ):
        lines = [[name, *(show(row[kind][domain]) for domain in domains)] for name, row in found["rows"].items()]
        parts.append(f"## {title}\n\n" + table(["Experts", *domains], lines))
    layers = zip(*(found["routing_accuracy"][domain] for domain in domains), strict=True)
    lines = [[str(number), *map(percent, shares)] for number, shares in enumerate(layers)]
    parts.append("## Tokens that lead to their own expert, %\n\n" + table(["Layer", *domains], lines))
    return "\n".join(parts)


def _read(texts: Path, experts: list[str], encoder: Encoder, length: int) -> dict[str, DomainTexts]:
    folders = sorted(path for path in texts.iterdir() if path.is_dir()) if texts.is_dir() else []
    if not folders:
        raise EvaluationRefused(f"{texts} must hold one folder of texts per expert, named {', '.join(experts)}")
    if strange := [folder.name for folder in folders if folder.name not in experts]:
        raise EvaluationRefused(f"{texts / strange[0]} belongs to no expert; there are {', '.join(experts)}")
    if links := [folder for folder in folders if folder.is_symlink()]:
        raise EvaluationRefused(f"{links[0]} is a link, which is not followed: put the texts themselves there")
    return {folder.name: _domain(folder, encoder, length) for folder in sorted(folders, key=_place(experts))}


def _place(experts: list[str]) -> Callable[[Path], int]:
    return lambda folder: experts.index(folder.name)


def _domain(folder: Path, encoder: Encoder, length: int) -> DomainTexts:
    held_out, probes = [], []
    for document in read_documents(folder):
        pieces = encoder.encode([document], length)
        held_out += pieces
        if document.prompt and len(pieces) == 1:
            probes += pieces
    return DomainTexts(held_out, probes)


def _row(figures: dict[str, Figures]) -> dict[str, Any]:
    accuracies = [figure.accuracy for figure in figures.values() if figure.accuracy is not None]
    return {
        "perplexity": {name: round(math.exp(figure.nats), 4) for name, figure in figures.items()},
        "accuracy": {name: figure.accuracy for name, figure in figures.items()},
        "macro": {
            "nats": round(fmean(figure.nats for figure in figures.values()), 5),
            "accuracy": fmean(accuracies) if accuracies else None,
        },
    }
