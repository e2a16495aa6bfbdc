"""Times of ours and of everything it is compared with, cell by cell of (batch size, experts allowed).

Shape suffixes: T tokens, E expert slots, K chosen experts, H hidden.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from flexgate.kernels.bench.baselines import Compute, grouped_mm, per_expert_cublas
from flexgate.kernels.bench.checks import errors
from flexgate.kernels.bench.place import Place, Run
from flexgate.kernels.bench.problem import Batch, Weights, random_batch
from flexgate.kernels.bench.roofline import Ceilings, floor_us
from flexgate.kernels.bench.stock import Config, StockLayer, default_config, tuning_space
from flexgate.kernels.gated_experts.launch import launch_gated_experts, launch_plan
from flexgate.kernels.gated_experts.tiles import TileTable
from flexgate.kernels.gated_topk.contract import FILL_NONE
from flexgate.kernels.gated_topk.kernel import launch_gated_topk

OURS = "flexgate"
ROUTING = "flexgate routing + plan"
CUBLAS = "cuBLAS per expert"
GROUPED = "torch._grouped_mm"
STOCK = "vLLM Triton, default"
TUNED = "vLLM Triton, tuned"

# Baselines round the gate and up products to bfloat16 before they activate; ours does not.
_BASELINE_RMS = 0.02


@dataclass
class Cell:
    """One batch: how much work it is, and how long each way of doing it took."""

    shape: str
    tokens: int
    slots: int
    allowed: int
    used: int
    picks: int
    floor_us: float | None
    times_us: dict[str, float | None] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    tuned: Config | None = None


@dataclass(frozen=True)
class Bench:
    """What all cells of one shape share."""

    place: Place
    shape: str
    layer: Weights
    table: TileTable
    ceilings: Ceilings | None
    stock: ModuleType | None

    def cell(self, tokens: int, allowed: int, tuned: Config | None = None) -> Cell:
        """Time everything on one batch; `tuned` is vLLM's best configuration where it is known."""
        batch = random_batch(self.place, self.layer.shape, tokens, range(allowed), seed=tokens)
        used, picks = len(batch.used()), batch.picks()
        floor = None if self.ceilings is None else floor_us(self.layer.shape, self.ceilings, used=used, picks=picks)
        cell = Cell(self.shape, tokens, self.layer.shape.slots, allowed, used, picks, floor, tuned=tuned)
        out_TH = self._ours(batch, cell)
        for name, make in ((CUBLAS, per_expert_cublas), (GROUPED, grouped_mm)):
            self._baseline(cell, name, out_TH, partial(_whole, make, self.layer, batch))
        if self.stock is not None:
            config = default_config(self.stock, self.layer, tokens)
            self._baseline(cell, STOCK, out_TH, partial(self._products, batch, config))
            self._tuned(cell, batch, out_TH)
        return cell

    def _ours(self, batch: Batch, cell: Cell) -> Tensor:
        tiles, layer, kernels = self.table.choose(batch.tokens), self.layer, self.place.experts
        out_TH = torch.empty_like(batch.x_TH)
        operands = (batch.x_TH, layer.w13_EGH, layer.w2_EHF, batch.weights_TK, batch.ids_TK, out_TH)
        cell.times_us[OURS] = self.place.median_us(lambda: launch_gated_experts(kernels, tiles, *operands))
        gate_T = torch.full((batch.tokens,), (1 << cell.allowed) - 1, dtype=torch.int64, device=self.place.device)
        mass_TU, unit_E = torch.zeros_like(batch.logits_TE, dtype=torch.int64), self.place.own_units(layer.shape.slots)
        chosen_T, slots, top_k = torch.zeros_like(gate_T), layer.shape.slots, layer.shape.top_k

        def route() -> None:
            routed = launch_gated_topk(
                self.place.topk, batch.logits_TE, gate_T, unit_E, None, mass_TU, chosen_T, top_k, False, FILL_NONE
            )
            launch_plan(kernels, *routed, slots, tiles.block_t)

        cell.times_us[ROUTING] = self.place.median_us(route)
        return out_TH

    def _products(self, batch: Batch, config: Config) -> tuple[Compute, Run]:
        assert self.stock is not None  # only asked where it is there
        made = StockLayer(self.place, self.stock.fused_moe_kernel, self.layer, batch, config).products()
        return made.output, made.both

    def _tuned(self, cell: Cell, batch: Batch, out_TH: Tensor) -> None:
        """The fastest of the space, or the configuration that was fastest with all experts allowed."""
        fastest: tuple[float, Config] | None = None
        for config in [cell.tuned] if cell.tuned else tuning_space(batch.tokens):
            self._baseline(cell, TUNED, out_TH, partial(self._products, batch, config))
            if TUNED in cell.times_us:
                took = cell.times_us.pop(TUNED) or 0.0
                fastest = min(fastest or (took, config), (took, config), key=lambda pair: pair[0])
        if fastest is not None:
            cell.times_us[TUNED] = fastest[0] or None
            cell.tuned = fastest[1]
            cell.failed.pop(TUNED, None)

    def _baseline(
        self,
        cell: Cell,
        name: str,
        ours_TH: Tensor,
        make: Callable[[], tuple[Compute, Run]],
    ) -> None:
        """Time a baseline whose output agrees with ours; note why where there is no time."""
        try:
            output, run = make()
            _, rms = errors(output(), ours_TH.double())
            if not rms <= _BASELINE_RMS:
                raise ArithmeticError(f"differs from ours by {rms:.1e} (root mean square)")
            cell.times_us[name] = self.place.median_us(run)
            cell.failed.pop(name, None)
        # Whatever keeps a baseline from running here is a finding of the run, not its end.
        except Exception as error:
            cell.failed.setdefault(name, f"{type(error).__name__}: {str(error)[:200]}")


def _whole(make: Callable[[Weights, Batch], Compute], layer: Weights, batch: Batch) -> tuple[Compute, Run]:
    """What gives the output is also what is timed."""
    compute = make(layer, batch)
    return compute, compute


def grid(bench: Bench, sizes: tuple[int, ...], enough: Callable[[], bool]) -> Iterator[Cell]:
    """All sizes with every expert allowed, then fewer and fewer experts, until the time is up."""
    tuned: dict[int, Config | None] = {}
    for allowed in range(bench.layer.shape.slots, 0, -1):
        for tokens in sizes:
            if not enough():
                return
            cell = bench.cell(tokens, allowed, tuned.get(tokens))
            tuned.setdefault(tokens, cell.tuned)
            yield cell
