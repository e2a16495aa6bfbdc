"""``flexgate experts evaluate``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from flexgate.experts.cli.support import Json, reported


def evaluate(
    model: Annotated[Path, typer.Argument(help="Merged checkpoint.")],
    texts: Annotated[Path, typer.Option(help="Folder with one folder of held-out texts per expert, named by its id.")],
    report: Annotated[Path | None, typer.Option(help="JSON file to write.", show_default=False)] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Markdown file to write the figures into.", show_default=False)
    ] = None,
    heatmap: Annotated[
        Path | None, typer.Option(help="SVG or PNG file to draw the opt-out matrix into.", show_default=False)
    ] = None,
    length: Annotated[int, typer.Option(help="Maximum length of a sequence, in tokens; longer texts are split.")] = 512,
    as_json: Json = False,
) -> None:
    """Measure a merged checkpoint with and without each expert: exact answers, perplexity, routing."""
    with reported(as_json) as show:
        from flexgate.experts.evaluation import checkpoint

        with tqdm(desc="gates", disable=None) as bar:
            found = checkpoint.evaluate_checkpoint(
                model, texts, length=length, progress=lambda count: bar.update(count) and None
            )
        rows = {
            name: {domain: value for domain, value in row["accuracy"].items() if value is not None}
            for name, row in found["rows"].items()
        }
        _write(found, checkpoint.report(found), rows, report, markdown, heatmap)
        show(found if as_json else {"exact answers, %": {name: _line(row) for name, row in rows.items()}})


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
