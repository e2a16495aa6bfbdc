"""Tile sizes as data: read from `kernels/tuning/*.json`, checked against the numerics contract, chosen by batch size.

Sizes change speed, never a result: whatever could change one cannot be written in these files (splitting the reduction,
a tile too narrow for the matrix instruction, a reduction step that differs between batch sizes).
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flexgate.kernels.errors import KernelConfigError

TUNING = Path(__file__).parent.parent / "tuning"
_MIN_BLOCK_T = 16
_MIN_BLOCK_N = 64


@dataclass(frozen=True)
class ProductTile:
    """How one of the two products is cut: N weight rows × D reduction columns per step; the tokens come from Tiles."""

    block_n: int
    block_d: int
    group: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """All choices for batches of up to max_tokens tokens (None: any number)."""

    max_tokens: int | None
    block_t: int
    gate_up: ProductTile
    down: ProductTile


@dataclass(frozen=True)
class TileTable:
    """The buckets of one shape on one device, ascending, the last one unbounded."""

    name: str
    origin: Literal["seed", "measured"]
    buckets: tuple[Tiles, ...]

    def choose(self, tokens: int) -> Tiles:
        """The smallest bucket that holds `tokens`."""
        return next(tiles for tiles in self.buckets if tiles.max_tokens is None or tokens <= tiles.max_tokens)


@functools.cache
def tile_table(hidden: int, intermediate: int, dtype: str, device: str, family: str) -> TileTable:
    """The table for this shape on this device; where nobody tuned it, its family's (`sm_90`), then everybody's."""
    names = (f"H={hidden},F={intermediate},{dtype},{device}", f"default,{family}", "default")
    for name in names:
        path = TUNING / f"{name}.json"
        if path.is_file():
            return read_tile_table(path)
    raise KernelConfigError(f"no tile table in {TUNING}: looked for {', '.join(names)}")


def read_tile_table(path: Path) -> TileTable:
    """Parse and check one file."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        buckets = tuple(_tiles(bucket) for bucket in stored["buckets"])
        table = TileTable(path.stem, stored["origin"], buckets)
    except (KeyError, TypeError, ValueError) as error:
        raise KernelConfigError(f"{path.name}: {error!r}") from error
    _check(table)
    return table


def _tiles(stored: dict[str, Any]) -> Tiles:
    products = {name: ProductTile(**stored[name]) for name in ("gate_up", "down")}
    return Tiles(stored["max_tokens"], stored["block_t"], **products)


def _check(table: TileTable) -> None:
    bounds = [tiles.max_tokens for tiles in table.buckets]
    finite = [bound for bound in bounds[:-1] if bound is not None]
    if not bounds or bounds[-1] is not None or len(finite) < len(bounds) - 1 or finite != sorted(set(finite)):
        raise KernelConfigError(f"{table.name}: max_tokens must ascend and end with null, got {bounds}")
    if table.origin not in ("seed", "measured"):
        raise KernelConfigError(f'{table.name}: origin must be "seed" or "measured", got {table.origin!r}')
    # Additions are grouped by reduction step wherever the matrix instruction does not do them one by one.
    if len({(tiles.gate_up.block_d, tiles.down.block_d) for tiles in table.buckets}) != 1:
        raise KernelConfigError(f"{table.name}: block_d must be the same in every bucket")
    for tiles in table.buckets:
        for product in (tiles.gate_up, tiles.down):
            _check_product(table.name, tiles.block_t, product)


def _check_product(name: str, block_t: int, product: ProductTile) -> None:
    sizes = (block_t, product.block_n, product.block_d)
    if any(size < 1 or size & (size - 1) for size in sizes):
        raise KernelConfigError(f"{name}: tile sizes must be powers of two, got {sizes}")
    # Narrower tiles select another matrix instruction, with another order of additions.
    if block_t < _MIN_BLOCK_T or product.block_n < _MIN_BLOCK_N or product.block_d < 16:
        raise KernelConfigError(f"{name}: needs block_t >= 16, block_n >= 64, block_d >= 16, got {sizes}")
    if product.warps not in (4, 8) or product.stages < 1 or product.group < 1:
        raise KernelConfigError(f"{name}: needs 4 or 8 warps, and at least one stage and group, got {product}")
