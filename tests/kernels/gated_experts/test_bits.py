"""What may not change one bit: excluded experts, neighbours in the batch, tile sizes, where the weights come from.

Shape suffixes: T tokens, E expert slots, K chosen experts, H hidden, F expert intermediate.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexgate.kernels.gated_experts import gated_experts
from flexgate.kernels.gated_experts.launch import Kernels, launch_gated_experts
from flexgate.kernels.gated_experts.tiles import ProductTile, Tiles


def same_bits(one: Tensor, other: Tensor) -> bool:
    integer = torch.int16 if one.dtype is torch.bfloat16 else torch.int32
    return torch.equal(one.contiguous().view(integer), other.contiguous().view(integer))


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [float("nan"), -1e30])
def test_masked_equals_poisoned_equals_absent(run: Any, layer: Any, dtype: torch.dtype, poison: float) -> None:
    gate_T = torch.tensor([0b101101101, 0b001101000, 0b000100000, 0b101101101, 0b100000001])
    gated = layer(5, 9, hidden=32, intermediate=40, top_k=4, dtype=dtype, gate_T=gate_T)
    kept = [0, 2, 3, 5, 6, 8]
    masked = run(gated)

    poisoned = replace(gated, w13_EGH=gated.w13_EGH.clone(), w2_EHF=gated.w2_EHF.clone())
    for slot in set(range(9)) - set(kept):
        poisoned.w13_EGH[slot], poisoned.w2_EHF[slot] = poison, poison
    assert same_bits(run(poisoned), masked)
    assert same_bits(run(gated.with_slots(kept)), masked)
    assert bool(masked.isfinite().all())


@pytest.mark.parametrize("use_tma", [False, True])
def test_a_tile_that_overhangs_its_expert_takes_nothing_from_the_next(run: Any, layer: Any, use_tma: bool) -> None:
    gated = layer(3, 3, hidden=36, intermediate=44, top_k=2, gate_T=torch.full((3,), 0b101))
    clean = run(gated, use_tma=use_tma)
    poisoned = replace(gated, w13_EGH=gated.w13_EGH.clone(), w2_EHF=gated.w2_EHF.clone())
    poisoned.w13_EGH[1], poisoned.w2_EHF[1] = float("nan"), float("nan")
    assert same_bits(run(poisoned, use_tma=use_tma), clean)


class Recorder:
    """Launches nothing and remembers with what it was launched."""

    def __init__(self) -> None:
        self.constants: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: self.constants.update(constants)


def test_products_and_sums_are_launched_without_contraction(layer: Any, small_tiles: Tiles) -> None:
    launched = Kernels(Recorder(), Recorder(), Recorder(), Recorder(), programs=3, use_tma=False)
    gated = layer(3, 3)
    launch_gated_experts(launched, small_tiles, *gated.operands(), torch.empty_like(gated.x_TH))
    for recorder in (launched.gate_up, launched.down, launched.combine):
        assert recorder.constants["enable_fp_fusion"] is False


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_the_same_alone_and_in_any_batch(run: Any, layer: Any, dtype: torch.dtype) -> None:
    gated = layer(24, 3, hidden=32, intermediate=40, top_k=2, dtype=dtype)
    together = run(gated)
    for tokens in ([0], [17], [5, 4, 3], list(range(12, 24))):
        assert same_bits(run(gated.with_tokens(tokens)), together[tokens])


def test_a_neighbour_full_of_nan_changes_nothing(run: Any, layer: Any) -> None:
    gated = layer(13, 3, hidden=32, intermediate=40, top_k=2)
    clean = run(gated)
    spoiled = replace(gated, x_TH=gated.x_TH.clone())
    spoiled.x_TH[6] = float("nan")
    others = [token for token in range(13) if token != 6]
    assert same_bits(run(spoiled)[others], clean[others])
    assert bool(run(spoiled)[6].isnan().all())


@pytest.mark.parametrize(
    ("block_t", "block_n", "group"), [(16, 64, 1), (16, 128, 2), (32, 64, 3), (64, 128, 1), (128, 64, 8)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tile_sizes_are_neutral(
    run: Any, layer: Any, dtype: torch.dtype, block_t: int, block_n: int, group: int
) -> None:
    gated = layer(20, 3, hidden=32, intermediate=72, top_k=2, dtype=dtype)
    product = ProductTile(block_n, 32, group, 4, 1)
    assert same_bits(run(gated, tiles=Tiles(None, block_t, product, product)), run(gated))


@pytest.mark.parametrize("changes", [{"use_tma": False}, {"programs": 1}, {"programs": 7}, {"programs": 132}])
def test_descriptors_and_the_number_of_programs_are_neutral(run: Any, layer: Any, changes: dict[str, Any]) -> None:
    gated = layer(10, 3, hidden=32, intermediate=72, top_k=2)
    assert same_bits(run(gated, **changes), run(gated))


@pytest.mark.parametrize("device", ["kernel", "cpu"])
def test_fillers_add_nothing_whatever_id_they_carry(run: Any, layer: Any, device: str) -> None:
    gated = layer(7, 7, hidden=32, intermediate=40, top_k=5, gate_T=torch.full((7,), 0b0010010))
    function = run if device == "kernel" else lambda given: gated_experts(*given.operands())
    unused_TK = gated.ids_TK < 0
    assert bool(unused_TK.any())
    clean = function(gated)
    for filler in (3, 99):
        spoiled = replace(gated, w2_EHF=gated.w2_EHF.clone(), ids_TK=torch.where(unused_TK, filler, gated.ids_TK))
        spoiled.w2_EHF[[0, 3, 6]] = float("nan")
        assert same_bits(function(spoiled), clean)
    nan = replace(gated, weights_TK=torch.where(unused_TK, float("nan"), gated.weights_TK))
    assert same_bits(function(nan), clean)
    first = replace(gated, ids_TK=torch.where(unused_TK, gated.ids_TK[:, :1], gated.ids_TK))
    assert same_bits(function(first), clean)


def test_the_order_of_a_tokens_picks_is_neutral(run: Any, layer: Any) -> None:
    """The combine adds in slot order, so ranks that swap (or a router that ranks differently) change nothing."""
    gated = layer(6, 5, hidden=32, intermediate=40, top_k=4, gate_T=torch.full((6,), 0b11111))
    turned = replace(gated, weights_TK=gated.weights_TK.flip(1), ids_TK=gated.ids_TK.flip(1))
    assert same_bits(run(turned), run(gated))


def test_a_token_without_any_expert_gets_zeros(run: Any, layer: Any) -> None:
    gated = layer(7, 3)
    gated.ids_TK[3], gated.weights_TK[3] = -1, 0
    assert same_bits(run(gated)[3], torch.zeros(64))
    gated.ids_TK.fill_(-1)
    assert same_bits(run(gated), torch.zeros(7, 64))
