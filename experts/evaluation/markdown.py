"""Tables of figures in Markdown, below whatever people wrote above them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

MARK: Final = "<!-- Figures: everything below is written by the command. -->"


def write_figures(path: Path, text: str) -> None:
    """Put ``text`` below the mark of ``path``; what stands above it stays."""
    above = path.read_text().split(MARK)[0] if path.is_file() else "# Evaluation\n\n"
    path.write_text(f"{above}{MARK}\n\n{text}")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def percent(value: Mapping[str, Any] | float | None) -> str:
    """A share in percent; of several seeds, with half the interval's width."""
    return scaled(value, 100, 1)


def scaled(value: Mapping[str, Any] | float | None, factor: float, digits: int) -> str:
    """A figure times ``factor``; of several seeds, with half the interval's width."""
    if value is None:
        return "–"
    if not isinstance(value, Mapping):
        return f"{factor * value:.{digits}f}"
    text = f"{factor * value['mean']:.{digits}f}"
    if value["ci95"] is not None:
        low, high = value["ci95"]
        text += f" ± {factor * (high - low) / 2:.{digits}f}"
    return text
