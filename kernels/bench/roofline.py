"""The least time that one gated expert layer can take: arithmetic on ceilings, no measurement.

Usage: `python -m flexgate.kernels.bench.roofline FILE.svg` plots it for FlexOlmo-7x7B on the data sheet's H200.

Shape suffixes: T tokens, E expert slots, K chosen experts, H hidden, F expert intermediate.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from flexgate.kernels.bench.plot import Chart, svg
from flexgate.kernels.testing.configurations import Shape

FLEXOLMO = Shape(hidden=4096, intermediate=11008, slots=7, top_k=5)
DEMO = Shape(hidden=128, intermediate=256, slots=5, top_k=2)
SHAPES = {"flexolmo-7x7b": FLEXOLMO, "demo": DEMO}
TOKENS = tuple(1 << power for power in range(14))

_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Ceilings:
    """What a device can do at most."""

    source: str
    bytes_per_s: float
    flop_per_s: float


H200_DATA_SHEET = Ceilings("NVIDIA H200 data sheet", 4.8e12, 989e12)


def expert_bytes(shape: Shape) -> int:
    """Weights of one expert in one layer."""
    return 3 * shape.hidden * shape.intermediate * _BYTES


def pick_flop(shape: Shape) -> int:
    """Work of one expert for one token."""
    return 6 * shape.hidden * shape.intermediate


def floor_us(shape: Shape, ceilings: Ceilings, *, used: float, picks: float) -> float:
    """The longer of reading the used experts once and computing the picks; activations are left out."""
    reading = used * expert_bytes(shape) / ceilings.bytes_per_s
    computing = picks * pick_flop(shape) / ceilings.flop_per_s
    return max(reading, computing) * 1e6


def expected_picks(shape: Shape, tokens: int, allowed: int) -> tuple[float, float]:
    """(experts used by anyone, picks) where every token picks evenly among `allowed` slots."""
    top_k = min(shape.top_k, allowed)
    return allowed * (1 - (1 - top_k / allowed) ** tokens), float(tokens * top_k)


def expected_floor_us(shape: Shape, ceilings: Ceilings, tokens: int, allowed: int) -> float:
    """`floor_us` where every token picks evenly among `allowed` slots."""
    used, picks = expected_picks(shape, tokens, allowed)
    return floor_us(shape, ceilings, used=used, picks=picks)


def chart() -> Chart:
    """One line for each number of experts that anyone in the batch may use."""
    lines = {
        f"{allowed} allowed": [
            (float(tokens), expected_floor_us(FLEXOLMO, H200_DATA_SHEET, tokens, allowed)) for tokens in TOKENS
        ]
        for allowed in range(1, FLEXOLMO.slots + 1)
    }
    title = f"FlexOlmo-7x7B, one layer, top-5 of 7: calculated from the {H200_DATA_SHEET.source}"
    return Chart(title, "tokens", "least µs a layer", lines, frozenset(lines))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(svg(chart()), encoding="utf-8")
