"""``flexgate experts evaluate``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from tqdm import tqdm

from flexgate.experts.cli.support import Json, reported


def evaluate(
    model: Annotated[Path | None, typer.Argument(help="Merged checkpoint.", show_default=False)] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Folder with one folder of held-out texts per expert id.", show_default=False)
    ] = None,
    protocol: Annotated[
        Literal["demo-sibling"] | None,
        typer.Option(help="Instead: train small models from nothing, and compare methods.", show_default=False),
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Where a protocol keeps its stages, and goes on from.", show_default=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The protocol on numbers too small to mean anything.")] = False,
    report: Annotated[Path | None, typer.Option(help="JSON file to write.", show_default=False)] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Markdown file whose figures to write.", show_default=False)
    ] = None,
    heatmap: Annotated[
        Path | None, typer.Option(help="SVG or PNG to draw the opt-out matrix in.", show_default=False)
    ] = None,
    length: Annotated[int, typer.Option(help="Longest piece of text, in tokens.")] = 512,
    as_json: Json = False,
) -> None:
    """Measure every expert with and without the others: exact answers, perplexity, routing."""
    with reported(as_json) as show:
        from flexgate.experts.errors import EvaluationRefused

        if protocol is None and work is None and not quick and model is not None and texts is not None:
            found, text, rows = _checkpoint(model, texts, length)
        elif protocol is not None and work is not None and model is texts is None:
            found, text, rows = _protocol(work, quick)
        else:
            raise EvaluationRefused("give either MODEL and --texts FOLDER, or --protocol NAME and --work FOLDER")
        _write(found, text, rows, report, markdown, heatmap)
        show(found if as_json else {"exact answers, %": {name: _line(row) for name, row in rows.items()}})


def _checkpoint(model: Path, texts: Path, length: int) -> tuple[dict[str, Any], str, dict[str, dict[str, float]]]:
    from flexgate.experts.evaluation.checkpoint import evaluate_checkpoint, report

    with tqdm(desc="gates", disable=None) as bar:
        found = evaluate_checkpoint(model, texts, length=length, progress=lambda count: bar.update(count) and None)
    rows = {
        name: {domain: value for domain, value in row["accuracy"].items() if value is not None}
        for name, row in found["rows"].items()
    }
    return found, report(found), rows


def _protocol(work: Path, quick: bool) -> tuple[dict[str, Any], str, dict[str, dict[str, float]]]:
    from flexgate.experts.evaluation.sibling.protocol import run
    from flexgate.experts.evaluation.sibling.report import heatmap_rows, report
    from flexgate.experts.evaluation.sibling.settings import QUICK, Settings

    found = run(QUICK if quick else Settings(), work)
    return found, report(found), heatmap_rows(found)


def _write(
    found: dict[str, Any],
    text: str,
    rows: Mapping[str, Mapping[str, float]],
    report: Path | None,
    markdown: Path | None,
    heatmap: Path | None,
) -> None:
    from flexgate.experts.errors import EvaluationRefused, OutputRefused
    from flexgate.experts.evaluation.heatmap import draw
    from flexgate.experts.evaluation.markdown import write_figures

    try:
        if report is not None:
            report.write_text(json.dumps(found, indent=1) + "\n")
        if markdown is not None:
            write_figures(markdown, text)
        if heatmap is not None:
            if not all(rows.values()):
                raise EvaluationRefused("a heatmap shows exact answers, and there are no probes")
            draw(rows, heatmap, title="exact answers, %")
    except OSError as error:
        raise OutputRefused(f"{error.filename} cannot be written: {error.strerror}") from error


def _line(row: Mapping[str, float]) -> str:
    return ", ".join(f"{domain} {100 * value:.1f}" for domain, value in row.items())
