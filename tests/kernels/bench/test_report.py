"""What a run writes: goals, plots, and the arithmetic under both."""

import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest

from flexgate.kernels.bench.plot import Chart, svg
from flexgate.kernels.bench.report import Result, goals, table, write
from flexgate.kernels.bench.roofline import (
    DEMO,
    FLEXOLMO,
    H200_DATA_SHEET,
    SHAPES,
    Ceilings,
    expected_floor_us,
    expert_bytes,
    floor_us,
)
from flexgate.kernels.bench.timing import CUBLAS, OURS, ROUTING, TUNED, Cell
from flexgate.kernels.testing.configurations import Shape


def cell(tokens: int, allowed: int, ours: float, floor: float, **others: float) -> Cell:
    times: dict[str, float | None] = {OURS: ours, ROUTING: 12.0, CUBLAS: 1000.0, TUNED: 2 * ours, **others}
    return Cell("flexolmo-7x7b", tokens, 7, allowed, allowed, tokens * 5, floor, times)


def result(*cells: Cell) -> Result:
    return Result("bench", "NVIDIA H200", True, ceilings=Ceilings("measured", 4.3e12, 7.9e14), cells=list(cells))


def test_goals_are_judged_from_the_cells() -> None:
    lines = goals([cell(32, 7, 480.0, 442.0), cell(32, 6, 415.0, 379.0), cell(32, 5, 360.0, 316.0)])
    assert lines == [
        "met  T=32: share of the memory floor: 0.92 (at least 0.9)",
        "met  T=32: times as fast as vLLM Triton, tuned: 2.00 (at least 1.3)",
        "met  T=32: routing + plan, µs: 12.00 (at most 15)",
        "OPEN T=32: least saving of one expert that no gate allows, µs: 55.00 (at least 60)",
    ]


def test_large_batches_are_compared_with_the_best_baseline() -> None:
    assert goals([cell(2048, 7, 4000.0, 3507.0, **{CUBLAS: 4200.0})]) == [
        "met  T=2048: share of the measured peak: 0.88 (at least 0.8)",
        "OPEN T=2048: times as fast as the best baseline: 1.05 (at least 1.1)",
    ]


def test_files_hold_the_numbers_and_a_plot(tmp_path: Path) -> None:
    written = write(result(cell(1, 7, 400.0, 315.0), cell(32, 7, 480.0, 442.0)), tmp_path)
    assert [path.name for path in written] == ["bench.json", "bench.txt", "roofline-flexolmo-7x7b.svg"]
    assert '"flexgate": 480.0' in written[0].read_text()
    drawing = ElementTree.fromstring(written[2].read_text())
    words = {element.text for element in drawing.iter("{http://www.w3.org/2000/svg}text")}
    assert {"flexgate", "floor", "µs a layer", "flexolmo-7x7b on NVIDIA H200, all experts allowed: measured"} <= words


def test_a_baseline_that_failed_shows_in_the_table() -> None:
    broken = cell(1, 7, 400.0, 315.0)
    broken.failed[CUBLAS] = "RuntimeError: no"
    assert "failed" in table(result(broken))


def test_a_plots_lines_rise_to_the_right_where_values_grow() -> None:
    drawing = ElementTree.fromstring(svg(Chart("t", "x", "y", {"a < b": [(1.0, 3.0), (8.0, 30.0), (64.0, 500.0)]})))
    (line,) = drawing.iter("{http://www.w3.org/2000/svg}polyline")
    places = [tuple(map(float, place.split(","))) for place in line.attrib["points"].split()]
    assert all(x2 > x1 and y2 < y1 for (x1, y1), (x2, y2) in pairwise(places))


def test_the_floor_is_reading_in_small_batches_and_computing_in_large_ones() -> None:
    assert expert_bytes(FLEXOLMO) == 270_532_608
    assert floor_us(FLEXOLMO, H200_DATA_SHEET, used=7, picks=5) == pytest.approx(394.5, abs=0.1)
    crossover = [
        tokens for tokens in range(1, 400) if reading(1) < floor_us(FLEXOLMO, H200_DATA_SHEET, used=1, picks=tokens)
    ]
    assert crossover[0] == 207
    assert floor_us(FLEXOLMO, H200_DATA_SHEET, used=7, picks=2048 * 5) == pytest.approx(2801, rel=0.01)


def reading(used: int) -> float:
    return floor_us(FLEXOLMO, H200_DATA_SHEET, used=used, picks=0)


@pytest.mark.parametrize("tokens", [1, 32, 512])
def test_the_floor_grows_with_every_expert_that_somebody_may_use(tokens: int) -> None:
    floors = [expected_floor_us(FLEXOLMO, H200_DATA_SHEET, tokens, allowed) for allowed in range(1, 8)]
    assert floors == sorted(floors)
    assert floors[0] < floors[4]


def test_the_demo_shape_is_the_shipped_checkpoints() -> None:
    import json

    import flexgate.experts.demo

    config = json.loads((Path(flexgate.experts.demo.__file__).parent / "checkpoint" / "config.json").read_text())
    sizes = (config["hidden_size"], config["intermediate_size"], config["num_experts"], config["num_experts_per_tok"])
    assert SHAPES["demo"] == DEMO == Shape(*sizes)
