"""The opt-out matrix as a picture: rows are gates, columns domains, colour is the share of exact answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexgate.experts.errors import EvaluationRefused


def draw(rows: Mapping[str, Mapping[str, float]], path: Path, *, title: str) -> None:
    """Write an SVG or PNG, by the suffix of ``path``; needs matplotlib (``pip install 'flexgate[plot]'``).

    Raises:
        EvaluationRefused: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise EvaluationRefused("a heatmap needs matplotlib: pip install 'flexgate[plot]'") from error
    matplotlib.use("agg")
    with matplotlib.rc_context({"svg.hashsalt": "flexgate", "svg.fonttype": "none", "font.size": 9}):
        _draw(rows, path, title)


def _draw(rows: Mapping[str, Mapping[str, float]], path: Path, title: str) -> None:
    from matplotlib import pyplot as plt

    columns = list(next(iter(rows.values())))
    values = [[row[column] for column in columns] for row in rows.values()]
    figure, axis = plt.subplots(figsize=(1.6 + 0.8 * len(columns), 0.9 + 0.32 * len(rows)))
    image = axis.imshow(values, cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            _label(axis, x, y, value)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_title(title)
    figure.colorbar(image)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=120)
    plt.close(figure)


def _label(axis: Any, x: int, y: int, value: float) -> None:
    colour = "white" if value < 0.55 else "black"
    axis.text(x, y, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=8)
