"""What the compiler makes of every shipped configuration on Hopper, in numbers; no GPU takes part."""

from itertools import product

import pytest

from flexgate.kernels.gated_experts.tiles import TUNING, Tiles, read_tile_table
from flexgate.kernels.gated_topk.exponential import COEFFICIENTS
from flexgate.kernels.testing.compiled import SHARED_LIMIT_SM_90, Binary
from flexgate.kernels.testing.configurations import (
    Shape,
    compile_combine,
    compile_down,
    compile_gate_up,
    compile_routing,
)

FLEXOLMO = Shape(hidden=4096, intermediate=11008, slots=7, top_k=5)
SMALL = Shape(hidden=256, intermediate=352, slots=9, top_k=2)
HOPPER_TABLES = [*sorted(TUNING.glob("H=*NVIDIA_H*.json")), TUNING / "default,sm_90.json"]


def buckets() -> list[object]:
    """(shape, tiles) of every bucket; the first and the last of the main shape in the fast suite."""
    cases: list[object] = []
    for path, shape in product(HOPPER_TABLES, (FLEXOLMO, SMALL)):
        table = read_tile_table(path)
        for tiles in table.buckets:
            fast = shape is FLEXOLMO and tiles in (table.buckets[0], table.buckets[-1])
            marks = () if fast else (pytest.mark.slow,)
            name = f"{path.stem}-{shape.intermediate}-{tiles.max_tokens}"
            cases.append(pytest.param(shape, tiles, marks=marks, id=name))
    return cases


def assert_tensor_cores(binary: Binary, tiles: Tiles) -> None:
    assert binary.count("HMMA") == 0
    products = {name for name in binary.opcodes if name.startswith("HGMMA")}
    # 64 rows of the expert by block_t tokens by 16 products, inputs bf16, sums fp32: one instruction shape throughout.
    assert len(products) == 1
    assert products.pop().startswith(f"HGMMA.64x{tiles.block_t}x16.F32.BF16")
    assert_no_spills(binary)


def assert_no_spills(binary: Binary) -> None:
    assert binary.local_bytes == 0
    assert binary.count("LDL") == 0
    assert binary.count("STL") == 0
    assert binary.registers <= 255
    assert binary.shared_bytes <= SHARED_LIMIT_SM_90


@pytest.mark.parametrize(("shape", "tiles"), buckets())
def test_products_use_wgmma_and_tma_without_spilling(shape: Shape, tiles: Tiles) -> None:
    gate_up = compile_gate_up(shape, tiles.block_t, tiles.gate_up)
    down = compile_down(shape, tiles.block_t, tiles.down)
    for binary in (gate_up, down):
        assert_tensor_cores(binary, tiles)
        assert binary.count("UTMALDG") > 0
        assert binary.count("FFMA") == 0
        # Whole CTAs of the persistent grid must fit: 65,536 registers per multiprocessor.
        assert binary.registers * 32 * tiles.gate_up.warps <= 65_536


@pytest.mark.slow
@pytest.mark.parametrize("bucket", range(2))
def test_the_portable_table_needs_no_tma(bucket: int) -> None:
    tiles = read_tile_table(TUNING / "default.json").buckets[bucket]
    for compiled in (
        compile_gate_up(SMALL, tiles.block_t, tiles.gate_up, use_tma=False),
        compile_down(SMALL, tiles.block_t, tiles.down, use_tma=False),
    ):
        assert_tensor_cores(compiled, tiles)
        assert compiled.count("UTMALDG") == 0


def test_combine_multiplies_and_adds_with_two_roundings() -> None:
    binary = compile_combine(FLEXOLMO)
    assert binary.count("FFMA") == 0
    assert binary.count("FMUL") >= FLEXOLMO.top_k
    assert binary.count("FADD") >= FLEXOLMO.top_k
    assert binary.count("RED") == binary.count("ATOM") == binary.count("ATOMG") == 0
    assert_no_spills(binary)


@pytest.mark.parametrize("experts", [7, *(pytest.param(many, marks=pytest.mark.slow) for many in (64, 512))])
def test_routing_fits_registers_uses_no_atomics_and_contracts_nothing(experts: int) -> None:
    binary = compile_routing(Shape(4096, 11008, experts, 5), renormalize=True)
    assert_no_spills(binary)
    assert binary.count("RED") == binary.count("ATOM") == binary.count("ATOMG") == 0
    # The exponential is float64 in the order of its definition; FFMA belongs to the correctly rounded division.
    assert binary.count("DFMA") == 0
    assert binary.count("DMUL") >= len(COEFFICIENTS)
