"""Pictures of the committed result files: ratios with their intervals and bounds, and what changing experts costs."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

Bar = tuple[str, float, Sequence[float | None]]  # label, ratio, its interval; None: without bound
TEXT = {"svg.hashsalt": "flexgate", "svg.fonttype": "none", "font.size": 9}


def draw(results: Path) -> None:
    """Write ``speed.svg`` and ``changes.svg`` beside the result files that they show, if there are any."""
    panels = [_panel(source) for source in _sources(results)]
    if panels:
        with _figure(results / "speed.svg", len(panels), 4.2) as axes:
            for axis, (title, bounds, bars) in zip(axes, panels, strict=True):
                _fill(axis, title, bounds, bars)
    changes = results / "changes.json"
    if changes.exists():
        report = json.loads(changes.read_text())
        with _figure(results / "changes.svg", 2, 3.2) as (gaps, memory):
            _fill_gaps(gaps, report["gaps"])
            _fill_memory(memory, report["cycles"])


@contextmanager
def _figure(path: Path, columns: int, height: float) -> Iterator[Sequence[Any]]:
    with plt.rc_context(TEXT):
        figure, axes = plt.subplots(1, columns, figsize=(4.2 * columns, height), squeeze=False)
        yield axes[0]
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _sources(results: Path) -> list[tuple[str, dict[str, Any]]]:
    names = ("engine-eager", "engine-compiled", "serving")
    paths = [results / f"{name}.json" for name in names]
    return [(path.stem, json.loads(path.read_text())) for path in paths if path.exists()]


def _panel(source: tuple[str, dict[str, Any]]) -> tuple[str, dict[str, float], list[Bar]]:
    name, report = source
    if name == "serving":
        return "flexgate serve / vllm serve", {"bound": 0.95}, _serving_bars(report)
    bounds = {"bound against ungated": 0.97, "bound against Transformers": 1.0}
    return f"engine, {name.removeprefix('engine-')}", bounds, _engine_bars(report)


def _engine_bars(report: dict[str, Any]) -> list[Bar]:
    return [
        (f"{case['phase']} {case['batch']['requests']}, {other.removeprefix('gated/')}", value["median"], value["ci95"])
        for case in report["cases"]
        for other, value in case["ratio"].items()
    ]


def _serving_bars(report: dict[str, Any]) -> list[Bar]:
    return [
        (
            f"{case['endpoint']}{' streamed' * case['stream']} {case['clients']}, {name.replace('_', ' ')}",
            value.get("median", value.get("ratio")),
            value["ci95"],
        )
        for case in report["cases"]
        for name, value in case["ratio"].items()
        if name == "requests_per_second"
    ]


def _fill(axis: Any, title: str, bounds: dict[str, float], bars: list[Bar]) -> None:
    places = range(len(bars), 0, -1)
    values = [value for _, value, _ in bars]
    errors = [
        [value - (value if low is None else low) for _, value, (low, _) in bars],
        [(value if high is None else high) - value for _, value, (_, high) in bars],
    ]
    axis.errorbar(values, places, xerr=errors, fmt="o", capsize=2, markersize=4)
    for style, (label, bound) in zip(("-", "--"), bounds.items(), strict=False):
        axis.axvline(bound, color="black", linewidth=0.8, linestyle=style, label=f"{label} {bound}")
    axis.set_yticks(list(places), [label for label, _, _ in bars])
    axis.set_title(title)
    axis.set_xlabel("speed ratio, 95 % interval")
    axis.legend(fontsize=7)


def _fill_gaps(axis: Any, gaps: dict[str, Any]) -> None:
    histogram = gaps["histogram"]
    names = {"quiet": "no expert is added", "while_adding": "while an expert is added"}
    for name, label in names.items():
        counts = histogram[name]
        edges = [1000 * histogram["bin_seconds"] * number for number in range(len(counts) + 1)]
        axis.stairs([count / max(1, sum(counts)) for count in counts], edges, label=label)
    axis.axvline(1000 * gaps["bound_seconds"], color="black", linewidth=0.8, label="bound")
    axis.set_yscale("log")
    axis.set_xlim(0, 1500 * max(gaps["bound_seconds"], gaps["with_an_add_seconds"]["worst"]))
    axis.set_xlabel("milliseconds between two tokens of an answer")
    axis.set_ylabel("share of gaps")
    axis.legend(fontsize=7)


def _fill_memory(axis: Any, cycles: dict[str, Any]) -> None:
    resident = cycles["resident_bytes"]
    done = [cycles["cycles"] * number / (len(resident) - 1) for number in range(len(resident))]
    axis.plot(done, [value / 1e9 for value in resident], marker="o", markersize=3)
    axis.set_ylim(0, 1.2e-9 * max(resident))
    axis.set_xlabel("experts added and revoked")
    axis.set_ylabel("resident memory, GB")
