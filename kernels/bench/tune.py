"""Find tile sizes for one shape on this GPU; accept none that changes a bit.

At most 40 configurations. Each is compared bit for bit with one fixed configuration on two batches before it is timed;
the table put together from the fastest has to pass all bit checks of the benchmark before it is written.

Usage: `python -m flexgate.kernels.bench.tune [--shape demo]` writes into kernels/tuning.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import triton
from torch import Tensor

from flexgate.kernels.bench.checks import bit_checks, compute
from flexgate.kernels.bench.place import Place, gpu
from flexgate.kernels.bench.problem import Batch, Weights, random_batch, random_weights
from flexgate.kernels.bench.roofline import SHAPES
from flexgate.kernels.gated_experts.launch import launch_down, launch_gate_up, launch_plan
from flexgate.kernels.gated_experts.tiles import TUNING, ProductTile, Tiles, TileTable
from flexgate.kernels.testing.configurations import Shape

Cut = tuple[int, int, int, int, int]
"""block_t, block_n, group, warps, stages; block_d is one for the whole table."""
Bound = int | None

MOST = 40
_FIXED: Cut = (16, 64, 1, 4, 3)
_SMALL = ((64, 1, 4, 8), (64, 1, 4, 5), (64, 1, 8, 6), (128, 1, 4, 5), (128, 1, 4, 3), (128, 1, 8, 5))
SPACE: Mapping[Bound, Sequence[Cut]] = {
    16: tuple((16, *cut) for cut in _SMALL),
    32: (*((32, *cut) for cut in _SMALL), (16, 64, 2, 4, 8), (16, 128, 2, 4, 5)),
    128: (
        (64, 64, 1, 4, 6), (64, 128, 1, 4, 4), (64, 128, 2, 4, 5), (64, 128, 1, 8, 5),
        (32, 64, 4, 4, 6), (32, 128, 4, 4, 5), (32, 128, 4, 8, 5), (128, 128, 1, 8, 4),
    ),
    512: (
        (64, 64, 8, 4, 5), (64, 128, 8, 4, 4), (64, 128, 8, 8, 5), (64, 256, 8, 8, 3),
        (128, 64, 8, 4, 5), (128, 128, 4, 8, 4), (128, 128, 8, 8, 4), (128, 128, 8, 8, 3),
    ),
    None: (
        (64, 128, 16, 8, 5), (64, 256, 16, 8, 3), (128, 64, 16, 4, 5), (128, 128, 8, 8, 4),
        (128, 128, 16, 8, 4), (128, 128, 32, 8, 4), (128, 128, 16, 8, 3), (128, 256, 16, 8, 3),
    ),
}  # fmt: skip
_UNBOUNDED_TOKENS = 4096


@dataclass(frozen=True)
class Trial:
    """One configuration of one product: refused with a reason, or how long the product took."""

    product: Literal["gate_up", "down"]
    cut: Cut
    refused: str = ""
    took_us: float = 0.0


def tune(
    place: Place, shape: Shape, block_d: int, space: Mapping[Bound, Sequence[Cut]]
) -> tuple[list[Tiles], dict[Bound, list[Trial]]]:
    """The fastest accepted tiles of every bucket, and every trial. Raises ValueError where a bucket has none."""
    if sum(map(len, space.values())) > MOST:
        raise ValueError(f"a tuning space holds at most {MOST} configurations")
    layer = random_weights(place, shape)
    ragged = random_batch(place, shape, 13, range(1, shape.slots))
    tried: dict[Bound, list[Trial]] = {}
    for bound, cuts in space.items():
        tokens = bound or (_UNBOUNDED_TOKENS if place.measured else 20)
        batches = (random_batch(place, shape, tokens, range(shape.slots)), ragged)
        wanted = [compute(place, _tiles(_FIXED, block_d), layer, batch) for batch in batches]
        tried[bound] = [
            _try(place, layer, batches, wanted, Trial(product, cut), block_d)
            for cut in cuts
            for product in ("gate_up", "down")
        ]
    return [_fastest(bound, trials, block_d) for bound, trials in tried.items()], tried


def _try(
    place: Place, layer: Weights, batches: Sequence[Batch], wanted: Sequence[Tensor], trial: Trial, block_d: int
) -> Trial:
    fixed, product = _tiles((trial.cut[0], *_FIXED[1:]), block_d), _product(trial.cut, block_d)
    tiles = replace(fixed, gate_up=product) if trial.product == "gate_up" else replace(fixed, down=product)
    try:
        ours = [compute(place, tiles, layer, batch) for batch in batches]
        if not all(torch.equal(one, other) for one, other in zip(ours, wanted, strict=True)):
            return replace(trial, refused="changes bits")
        return replace(trial, took_us=_time(place, layer, batches[0], tiles, trial.product) or 0.0)
    # A configuration that the compiler or the device does not take is one that is not accepted.
    except Exception as error:
        return replace(trial, refused=f"{type(error).__name__}: {str(error)[:200]}")


def _time(place: Place, layer: Weights, batch: Batch, tiles: Tiles, product: str) -> float | None:
    plan = launch_plan(place.experts, batch.weights_TK, batch.ids_TK, layer.shape.slots, tiles.block_t)

    def gate_up() -> Tensor:
        return launch_gate_up(place.experts, tiles.block_t, tiles.gate_up, batch.x_TH, layer.w13_EGH, plan)

    hidden_PF = gate_up()

    def down() -> Tensor:
        return launch_down(place.experts, tiles.block_t, tiles.down, hidden_PF, layer.w2_EHF, plan)

    return place.median_us(gate_up if product == "gate_up" else down)


def _fastest(bound: Bound, trials: Sequence[Trial], block_d: int) -> Tiles:
    pairs = []
    for block_t in dict.fromkeys(trial.cut[0] for trial in trials):
        own = [trial for trial in trials if trial.cut[0] == block_t and not trial.refused]
        first = min((t for t in own if t.product == "gate_up"), key=lambda t: t.took_us, default=None)
        second = min((t for t in own if t.product == "down"), key=lambda t: t.took_us, default=None)
        if first is not None and second is not None:
            pairs.append((first.took_us + second.took_us, first.cut, second.cut))
    if not pairs:
        raise ValueError(f"no configuration for batches up to {bound} was accepted: {trials}")
    _, first_cut, second_cut = min(pairs, key=lambda pair: pair[0])
    return Tiles(bound, first_cut[0], _product(first_cut, block_d), _product(second_cut, block_d))


def _tiles(cut: Cut, block_d: int) -> Tiles:
    return Tiles(None, cut[0], _product(cut, block_d), _product(cut, block_d))


def _product(cut: Cut, block_d: int) -> ProductTile:
    _, block_n, group, warps, stages = cut
    return ProductTile(block_n, block_d, group, warps, stages)


def write_table(
    place: Place, shape: Shape, buckets: Sequence[Tiles], tried: Mapping[Bound, Sequence[Trial]], folder: Path
) -> Path:
    """The table as a file that names how it came about. Raises ValueError where it fails a bit check."""
    origin = "measured" if place.measured else "seed"
    name = f"H={shape.hidden},F={shape.intermediate},bfloat16,{place.tables[0]}"
    table = TileTable(name, origin, tuple(buckets))  # type: ignore[arg-type]
    checks = bit_checks(place, table, random_weights(place, shape), 129 if place.measured else 17)
    if failed := [check.name for check in checks if not check.passed]:
        raise ValueError(f"{name} fails {', '.join(failed)}")
    stored = {
        "origin": origin,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "buckets": [asdict(tiles) for tiles in buckets],
        "tried": [{"max_tokens": bound, **asdict(trial)} for bound, trials in tried.items() for trial in trials],
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune, write, and say what was refused."""
    parser = argparse.ArgumentParser(prog="python -m flexgate.kernels.bench.tune", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="flexolmo-7x7b")
    parser.add_argument("--block-d", type=int, default=64, help="columns of one reduction step, in all buckets")
    parser.add_argument("--out", type=Path, default=TUNING)
    options = parser.parse_args(arguments)
    place, shape = gpu(), SHAPES[options.shape]
    buckets, tried = tune(place, shape, options.block_d, SPACE)
    path = write_table(place, shape, buckets, tried, options.out)
    for bound, trials in tried.items():
        for trial in trials:
            sys.stdout.write(
                f"T <= {bound}: {trial.product} {trial.cut} {trial.refused or f'{trial.took_us:.1f} µs'}\n"
            )
    sys.stdout.write(f"wrote {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
