"""Check and time the kernels; print a table, write JSON and plots. One command, one GPU, at most ten minutes.

Order of work: ceilings, compilation for Hopper, values against float64, equalities bit for bit, times. A check that
fails ends the run before anything is timed. With `--interpret` the same work runs on a tiny layer in Triton's
interpreter; nothing is measured then.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from flexgate.kernels.bench.ceilings import measured_ceilings
from flexgate.kernels.bench.checks import Check, bit_checks, value_checks
from flexgate.kernels.bench.place import Place, gpu, interpreter
from flexgate.kernels.bench.problem import Weights, random_weights
from flexgate.kernels.bench.report import Result, new_result, table, write
from flexgate.kernels.bench.roofline import SHAPES, TOKENS
from flexgate.kernels.bench.stock import find_source, load_stock
from flexgate.kernels.bench.timing import Bench, grid
from flexgate.kernels.gated_experts.tiles import TileTable, read_tile_table, tile_table
from flexgate.kernels.testing.compiled import Binary
from flexgate.kernels.testing.configurations import Shape, compile_combine, compile_down, compile_gate_up

TINY = Shape(hidden=64, intermediate=96, slots=4, top_k=2)


@dataclass(frozen=True)
class Plan:
    """How much of everything a run does."""

    shapes: dict[str, Shape]
    checked: Sequence[int]
    timed: Sequence[int]
    together: int
    """Tokens of the batch whose bits are compared."""


FULL = Plan(SHAPES, (1, 3, 8, 17, 32, 64, 129, 512, 2048), TOKENS, 129)
DRY = Plan({"tiny": TINY}, (1, 7), (1, 5), 17)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 1 if a check failed."""
    options = _parser().parse_args(arguments)
    place = interpreter() if options.interpret else gpu()
    plan = DRY if options.interpret else FULL
    result = new_result(place)
    started = time.monotonic()
    stock = _stock(options.vllm_source, result)
    try:
        _run(result, place, plan, stock, until=started + options.seconds, tables=options.tiles)
    finally:
        result.seconds = time.monotonic() - started
        written = write(result, options.out)
        sys.stdout.write(table(result))
        sys.stdout.write(f"{result.seconds:.0f} s; wrote {', '.join(str(path) for path in written)}\n")
    return 0 if result.passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flexgate.kernels.bench", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/kernels-bench"), help="folder of the result files")
    parser.add_argument("--seconds", type=float, default=570.0, help="no new cell is begun after this time")
    parser.add_argument("--interpret", action="store_true", help="no GPU: a tiny layer in the interpreter, untimed")
    parser.add_argument("--tiles", type=Path, help="one tile table for all shapes instead of the shipped ones")
    parser.add_argument("--vllm-source", type=Path, help="vLLM's fused_moe.py; found by itself where vLLM is installed")
    return parser


def _run(
    result: Result, place: Place, plan: Plan, stock: ModuleType | None, *, until: float, tables: Path | None
) -> None:
    result.ceilings = measured_ceilings(place)
    layers: dict[str, tuple[Weights, TileTable]] = {}
    for name, shape in plan.shapes.items():
        tiles = read_tile_table(tables) if tables else _shipped(place, shape)
        layer, _ = layers[name] = random_weights(place, shape), tiles
        result.compiled += [{"shape": name, **row} for row in _compiled(shape, tiles)]
        gates = [tuple(range(allowed)) for allowed in range(1, shape.slots + 1)]
        for check in (
            *value_checks(place, tiles, layer, plan.checked, gates),
            *bit_checks(place, tiles, layer, plan.together),
        ):
            result.checks.append(Check(f"{name}: {check.name}", check.passed, check.detail))
    if not result.passed:
        result.skipped.append("all times: a check failed")
        return
    for name, (layer, tiles) in layers.items():
        bench = Bench(place, name, layer, tiles, result.ceilings, stock)
        cells = list(grid(bench, tuple(plan.timed), lambda: time.monotonic() < until))
        result.cells += cells
        missing = len(plan.timed) * layer.shape.slots - len(cells)
        if missing:
            result.skipped.append(f"{missing} cells of {name}: the time was up")


def _shipped(place: Place, shape: Shape) -> TileTable:
    return tile_table(shape.hidden, shape.intermediate, "bfloat16", *place.tables)


def _compiled(shape: Shape, tiles: TileTable) -> Iterator[dict[str, Any]]:
    """What the Hopper binaries of every bucket hold, wherever this runs."""
    for bucket in tiles.buckets:
        for product, compiled in (
            ("gate_up", compile_gate_up(shape, bucket.block_t, bucket.gate_up)),
            ("down", compile_down(shape, bucket.block_t, bucket.down)),
        ):
            yield {"kernel": product, "max_tokens": bucket.max_tokens, **_numbers(compiled)}
    yield {"kernel": "combine", "max_tokens": None, **_numbers(compile_combine(shape))}


def _numbers(binary: Binary) -> dict[str, int]:
    counted = {name: binary.count(name) for name in ("HGMMA", "HMMA", "UTMALDG", "FFMA")}
    return {"registers": binary.registers, "local_bytes": binary.local_bytes, "shared": binary.shared_bytes, **counted}


def _stock(given: Path | None, result: Result) -> ModuleType | None:
    source = given or find_source()
    if source is None:
        result.skipped.append("vLLM's Triton kernel: vLLM is not installed; --vllm-source names its fused_moe.py")
        return None
    return load_stock(source)


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
