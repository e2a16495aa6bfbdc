"""Find tile sizes for one shape on this GPU; admit none that changes a bit.

At most 40 configurations. Each is compared bit for bit with one fixed configuration on two batches before it is timed;
the table put together from the fastest has to pass all bit checks of the benchmark before it is written.

Usage: `python -m flexgate.kernels.bench.tune [--shape demo]` writes into kernels/tuning.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

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
    """One configuration: refused with a reason, or how long each of the two products took."""

    cut: Cut
    refused: str = ""
    gate_up_us: float = 0.0
    down_us: float = 0.0


def tune(
    place: Place, shape: Shape, block_d: int, space: Mapping[Bound, Sequence[Cut]]
) -> tuple[list[Tiles], dict[Bound, list[Trial]]]:
    """The fastest admitted tiles of every bucket, and every trial. Raises ValueError where a bucket has none."""
    if sum(map(len, space.values())) > MOST:
        raise ValueError(f"a tuning space holds at most {MOST} configurations")
    layer = random_weights(place, shape)
    ragged = random_batch(place, shape, 13, range(1, shape.slots))
    tried: dict[Bound, list[Trial]] = {}
    for bound, cuts in space.items():
        tokens = bound or (_UNBOUNDED_TOKENS if place.measured else 20)
        batches = (random_batch(place, shape, tokens, range(shape.slots)), ragged)
        fixed = _tiles(None, (16, 64, 1, 4, 3), block_d)
        wanted = [compute(place, fixed, layer, batch) for batch in batches]
        tried[bound] = [_try(place, layer, batches, wanted, cut, block_d) for cut in cuts]
    return [_fastest(bound, trials, block_d) for bound, trials in tried.items()], tried


def _try(
    place: Place, layer: Weights, batches: Sequence[Batch], wanted: Sequence[torch.Tensor], cut: Cut, block_d: int
) -> Trial:
    tiles = _tiles(None, cut, block_d)
    try:
        same = [
            torch.equal(compute(place, tiles, layer, batch), out) for batch, out in zip(batches, wanted, strict=True)
        ]
        if not all(same):
            return Trial(cut, "changes bits")
        return Trial(cut, "", *_times(place, layer, batches[0], tiles))
    # A configuration that the compiler or the device does not take is one that is not admitted.
    except Exception as error:
        return Trial(cut, f"{type(error).__name__}: {str(error)[:200]}")


def _times(place: Place, layer: Weights, batch: Batch, tiles: Tiles) -> tuple[float, float]:
    plan = launch_plan(place.experts, batch.weights_TK, batch.ids_TK, layer.shape.slots, tiles.block_t)

    def gate_up() -> torch.Tensor:
        return launch_gate_up(place.experts, tiles.block_t, tiles.gate_up, batch.x_TH, layer.w13_EGH, plan)

    hidden_PF = gate_up()

    def down() -> torch.Tensor:
        return launch_down(place.experts, tiles.block_t, tiles.down, hidden_PF, layer.w2_EHF, plan)

    return place.median_us(gate_up) or 0.0, place.median_us(down) or 0.0


def _fastest(bound: Bound, trials: Sequence[Trial], block_d: int) -> Tiles:
    admitted = [trial for trial in trials if not trial.refused]
    if not admitted:
        raise ValueError(f"no configuration for batches up to {bound} was admitted: {trials}")
    pairs = []
    for block_t in dict.fromkeys(trial.cut[0] for trial in admitted):
        own = [trial for trial in admitted if trial.cut[0] == block_t]
        first, second = min(own, key=lambda t: t.gate_up_us), min(own, key=lambda t: t.down_us)
        pairs.append((first.gate_up_us + second.down_us, first, second))
    _, first, second = min(pairs, key=lambda pair: pair[0])
    return Tiles(bound, first.cut[0], _product(first.cut, block_d), _product(second.cut, block_d))


def _tiles(bound: Bound, cut: Cut, block_d: int) -> Tiles:
    return Tiles(bound, cut[0], _product(cut, block_d), _product(cut, block_d))


def _product(cut: Cut, block_d: int) -> ProductTile:
    _, block_n, group, warps, stages = cut
    return ProductTile(block_n, block_d, group, warps, stages)


def write_table(
    place: Place, shape: Shape, buckets: Sequence[Tiles], tried: Mapping[Bound, Sequence[Trial]], folder: Path
) -> Path:
    """The table as a file that names how it came about. Raises ValueError where it fails a bit check."""
    device = place.name.replace(" ", "_")
    origin = "measured" if place.measured else "seed"
    name = f"H={shape.hidden},F={shape.intermediate},bfloat16,{device}"
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
            said = trial.refused or f"gate/up {trial.gate_up_us:.1f} µs, down {trial.down_us:.1f} µs"
            sys.stdout.write(f"T <= {bound}: {trial.cut} {said}\n")
    sys.stdout.write(f"wrote {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
