"""What has to hold before anything is timed: values against float64, and equalities bit for bit.

Shape suffixes: T tokens, E expert slots, K chosen experts, H hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexgate.kernels.bench.place import Place
from flexgate.kernels.bench.problem import Batch, Weights, exact_rows, random_batch, routed
from flexgate.kernels.gated_experts.launch import Kernels, launch_gated_experts
from flexgate.kernels.gated_experts.tiles import Tiles, TileTable

SENTINEL = 777.0
# Errors of bfloat16 outputs relative to the root mean square of the exact ones: two roundings of half a unit in the
# last place each (2**-9), one of them averaged over the second product.
MAX_ERROR = 0.03
RMS_ERROR = 0.004


@dataclass(frozen=True)
class Check:
    """One statement and whether it held."""

    name: str
    passed: bool
    detail: str = ""


def compute(place: Place, tiles: Tiles, layer: Weights, batch: Batch, kernels: Kernels | None = None) -> Tensor:
    """Our layer's output, written into a buffer of NaN between two rows of sentinels that must stay."""
    guarded = batch.x_TH.new_full((batch.tokens + 2, layer.shape.hidden), float("nan"))
    guarded[0] = guarded[-1] = SENTINEL
    operands = (batch.x_TH, layer.w13_EGH, layer.w2_EHF, batch.weights_TK, batch.ids_TK)
    launch_gated_experts(kernels or place.experts, tiles, *operands, guarded[1:-1])
    if not bool((guarded[0] == SENTINEL).all() and (guarded[-1] == SENTINEL).all()):
        raise RuntimeError("the kernels wrote outside of their output")
    return guarded[1:-1]


def errors(ours_TH: Tensor, exact_TH: Tensor) -> tuple[float, float]:
    """(largest, root mean square) error relative to the exact root mean square."""
    scale = float(exact_TH.square().mean().sqrt())
    error_TH = (ours_TH.double() - exact_TH).abs()
    return float(error_TH.max()) / scale, float(error_TH.square().mean().sqrt()) / scale


def value_checks(
    place: Place, table: TileTable, layer: Weights, sizes: Sequence[int], gates: Sequence[Sequence[int]]
) -> Iterator[Check]:
    """Sampled rows of every batch size under every gate, with everything that no gate allows full of NaN."""
    for allowed in gates:
        slots = range(layer.shape.slots)
        poisoned = layer.without([slot for slot in slots if slot not in allowed])
        for tokens in sizes:
            batch = random_batch(place, layer.shape, tokens, allowed, seed=tokens)
            sampled = sorted({0, tokens // 3, tokens // 2, tokens - 1})
            ours_TH = compute(place, table.choose(tokens), poisoned, batch)[sampled]
            largest, rms = errors(ours_TH, exact_rows(layer, batch.rows(sampled)))
            passed = largest <= MAX_ERROR and rms <= RMS_ERROR
            detail = f"max {largest:.2e}, rms {rms:.2e}"
            yield Check(f"float64, T={tokens}, {len(allowed)} allowed", passed, detail)


def bit_checks(place: Place, table: TileTable, layer: Weights, tokens: int) -> Iterator[Check]:
    """Tile sizes, grids, weight loads, neighbours, and what an excluded expert holds must not change one bit."""
    everyone = random_batch(place, layer.shape, tokens, range(layer.shape.slots))
    chosen = table.choose(tokens)
    whole_TH = compute(place, chosen, layer, everyone)
    for tiles in table.buckets:
        same = torch.equal(compute(place, tiles, layer, everyone), whole_TH)
        yield Check(f"tiles up to T={tiles.max_tokens} = tiles up to T={chosen.max_tokens}", same)
    for name, kernels in {
        "one program fewer": replace(place.experts, programs=place.experts.programs - 1),
        "pointers = TMA": replace(place.experts, use_tma=not place.experts.use_tma),
    }.items():
        yield Check(name, torch.equal(compute(place, chosen, layer, everyone, kernels), whole_TH))
    for token in sorted({0, tokens // 2, tokens - 1}):
        alone_TH = compute(place, table.choose(1), layer, everyone.rows([token]))
        yield Check(f"token {token} alone = in a batch of {tokens}", torch.equal(alone_TH[0], whole_TH[token]))
    yield from _exclusion_checks(place, table, layer, everyone)


def _exclusion_checks(place: Place, table: TileTable, layer: Weights, everyone: Batch) -> Iterator[Check]:
    kept = [slot for slot in range(layer.shape.slots) if slot != 1]
    masked = routed(place, layer.shape, everyone.x_TH, everyone.logits_TE, kept)
    masked_TH = compute(place, table.choose(masked.tokens), layer, masked)
    poisoned_TH = compute(place, table.choose(masked.tokens), layer.without([1]), masked)
    yield Check("masked = full of NaN", torch.equal(poisoned_TH, masked_TH))
    small = layer.compacted(kept)
    logits_TE = everyone.logits_TE[:, kept].contiguous()
    compact = routed(place, small.shape, everyone.x_TH, logits_TE, range(len(kept)))
    slot_E = torch.tensor([*kept, -1], dtype=torch.int32, device=place.device)
    same_routing = torch.equal(slot_E[compact.ids_TK.long()], masked.ids_TK)
    same_weights = torch.equal(compact.weights_TK, masked.weights_TK)
    yield Check("routing masked = absent", same_routing and same_weights)
    compact_TH = compute(place, table.choose(masked.tokens), small, compact)
    yield Check("masked = absent", torch.equal(compact_TH, masked_TH))
