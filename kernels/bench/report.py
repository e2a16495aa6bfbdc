"""The run as JSON, as a short table, and as a roofline plot."""

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import triton

from flexgate.kernels.bench.checks import Check
from flexgate.kernels.bench.place import Place
from flexgate.kernels.bench.plot import Chart, svg
from flexgate.kernels.bench.roofline import Ceilings
from flexgate.kernels.bench.timing import CUBLAS, GROUPED, OURS, ROUTING, STOCK, TUNED, Cell

UNMEASURED = "speed is unmeasured: this run used Triton's interpreter, not a GPU"


@dataclass
class Result:
    """Everything that a run found."""

    command: str
    device: str
    measured: bool
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    clocks: dict[str, str] = field(default_factory=dict)
    ceilings: Ceilings | None = None
    compiled: list[dict[str, Any]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return bool(self.checks) and all(check.passed for check in self.checks)


def new_result(place: Place) -> Result:
    """An empty result that names the machine."""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "triton": triton.__version__}
    return Result(" ".join(sys.argv), place.name, place.measured, versions=versions, clocks=_clocks(place))


def write(result: Result, folder: Path) -> list[Path]:
    """bench.json, bench.txt, and a plot for each shape that was timed."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {"bench.json": json.dumps(asdict(result), indent=1) + "\n", "bench.txt": table(result)}
    for shape in dict.fromkeys(cell.shape for cell in result.cells):
        if chart := _chart(result, shape):
            written[f"roofline-{shape}.svg"] = svg(chart)
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in written]


def table(result: Result) -> str:
    """What a reader of the terminal sees."""
    lines = [f"{result.device}; {_pairs(result.versions)}; {_pairs(result.clocks)}"]
    if not result.measured:
        lines.append(UNMEASURED)
    if result.ceilings is not None:
        ceilings = result.ceilings
        lines.append(f"ceilings: {ceilings.bytes_per_s / 1e12:.2f} TB/s, {ceilings.flop_per_s / 1e12:.0f} TFLOP/s")
    failed = [check for check in result.checks if not check.passed]
    lines.append(f"checks: {len(result.checks) - len(failed)} of {len(result.checks)} passed")
    lines += [f"  FAILED {check.name} {check.detail}" for check in failed]
    names = (OURS, ROUTING, CUBLAS, GROUPED, STOCK, TUNED)
    for shape in dict.fromkeys(cell.shape for cell in result.cells):
        lines += ["", f"{shape}: microseconds a layer", _row(("T", "allowed", "used", "floor", *names))]
        lines += [_cell_row(cell, names) for cell in result.cells if cell.shape == shape]
    lines += ["", *goals(result.cells), *(f"skipped: {what}" for what in result.skipped)]
    return "\n".join(lines) + "\n"


def goals(cells: Iterable[Cell]) -> list[str]:
    """The goals for the FlexOlmo shape, each with what was reached; nothing where nothing was timed."""
    timed = [cell for cell in cells if cell.shape == "flexolmo-7x7b" and cell.times_us.get(OURS) is not None]
    whole = [cell for cell in timed if cell.allowed == cell.slots]
    lines = []
    for cell in whole:
        ours, floor = cell.times_us[OURS] or 0.0, cell.floor_us or 0.0
        if cell.tokens <= 32:
            lines.append(_goal(f"T={cell.tokens}: share of the memory floor", floor / ours, 0.90))
            lines += _faster(cell, ours, (TUNED,), 1.3)
        if cell.tokens >= 2048:
            lines.append(_goal(f"T={cell.tokens}: share of the measured peak", floor / ours, 0.80))
            lines += _faster(cell, ours, (CUBLAS, GROUPED, STOCK, TUNED), 1.1)
        if cell.tokens <= 128:
            lines.append(_goal(f"T={cell.tokens}: routing + plan, µs", cell.times_us[ROUTING] or 0.0, 15.0, most=True))
    lines += _slope([cell for cell in timed if cell.tokens == 32])
    return lines


def _faster(cell: Cell, ours: float, names: Sequence[str], goal: float) -> list[str]:
    rivals = [took for name in names if (took := cell.times_us.get(name)) is not None]
    what = f"T={cell.tokens}: times as fast as {'the best baseline' if len(names) > 1 else names[0]}"
    return [_goal(what, min(rivals) / ours, goal)] if rivals else []


def _slope(cells: Sequence[Cell]) -> list[str]:
    by_allowed = sorted(cells, key=lambda cell: cell.allowed)
    steps = [(more.times_us[OURS] or 0.0) - (fewer.times_us[OURS] or 0.0) for fewer, more in pairwise(by_allowed)]
    return [_goal("T=32: least saving of one expert that no gate allows, µs", min(steps), 60.0)] if steps else []


def _goal(what: str, reached: float, goal: float, *, most: bool = False) -> str:
    met = reached <= goal if most else reached >= goal
    return f"{'met ' if met else 'OPEN'} {what}: {reached:.2f} ({'at most' if most else 'at least'} {goal:g})"


def _chart(result: Result, shape: str) -> Chart | None:
    cells = [cell for cell in result.cells if cell.shape == shape and cell.allowed == cell.slots]
    lines: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        for name, took in (("floor", cell.floor_us), *cell.times_us.items()):
            if took is not None and name != ROUTING:
                lines.setdefault(name, []).append((float(cell.tokens), took))
    if not lines:
        return None
    title = f"{shape} on {result.device}, all experts allowed: measured"
    return Chart(title, "tokens", "µs a layer", lines, frozenset({"floor"}))


def _cell_row(cell: Cell, names: Sequence[str]) -> str:
    times = ("failed" if name in cell.failed else _us(cell.times_us.get(name)) for name in names)
    return _row((str(cell.tokens), str(cell.allowed), str(cell.used), _us(cell.floor_us), *times))


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _row(values: Sequence[str]) -> str:
    return "  ".join(value.rjust(max(8, len(name))) for value, name in zip(values, _HEADS, strict=True))


_HEADS = ("T", "allowed", "used", "floor", OURS, ROUTING, CUBLAS, GROUPED, STOCK, TUNED)


def _pairs(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _clocks(place: Place) -> dict[str, str]:
    if not place.measured:
        return {}
    asked = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader", "-i", str(place.device.index)]
    try:
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return {"nvidia-smi": f"not available ({type(error).__name__})"}
    return dict(zip(asked.split(","), (value.strip() for value in said.split(",")), strict=True))
