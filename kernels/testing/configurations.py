"""Every kernel as it ships: what to compile for Hopper, with the tile sizes of a table.

Shape suffixes as in the kernels.
"""

from dataclasses import dataclass

from flexgate.kernels.gated_experts import kernel
from flexgate.kernels.gated_experts.launch import COMBINE_BLOCK_H
from flexgate.kernels.gated_experts.tiles import ProductTile
from flexgate.kernels.gated_topk.contract import MAX_UNITS
from flexgate.kernels.gated_topk.kernel import gated_topk_kernel
from flexgate.kernels.testing.compiled import Binary, compile_kernel

_PLAN = dict.fromkeys(("order_ptr", "offsets_ptr", "tile_slot_ptr", "tile_row_ptr", "tiles_ptr"), "*i32")
_H200_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Shape:
    """One model's expert layer."""

    hidden: int
    intermediate: int
    slots: int
    top_k: int


def compile_gate_up(shape: Shape, block_t: int, product: ProductTile, *, use_tma: bool = True) -> Binary:
    """The first product with SwiGLU, in bfloat16."""
    signature = {"x_ptr": "*bf16", "w13": _weights(product, use_tma), "hidden_ptr": "*bf16", **_PLAN}
    constants = {"TOP_K": shape.top_k, "USE_TMA": use_tma, **_sizes(shape, block_t, product)}
    return compile_kernel(kernel.gate_up_kernel, signature, constants, _options(product))


def compile_down(shape: Shape, block_t: int, product: ProductTile, *, use_tma: bool = True) -> Binary:
    """The second product, in bfloat16 with fp32 results."""
    signature = {"hidden_ptr": "*bf16", "w2": _weights(product, use_tma), "expert_ptr": "*fp32", **_PLAN}
    del signature["order_ptr"]
    constants = {"USE_TMA": use_tma, **_sizes(shape, block_t, product)}
    return compile_kernel(kernel.down_kernel, signature, constants, _options(product))


def compile_combine(shape: Shape) -> Binary:
    """The weighted sum in slot order."""
    signature = {"expert_ptr": "*fp32", "weights_ptr": "*fp32", "position_ptr": "*i32", "out_ptr": "*bf16"}
    constants = {
        "HIDDEN": shape.hidden,
        "TOP_K": shape.top_k,
        "BLOCK_K": 1 << (shape.top_k - 1).bit_length(),
        "BLOCK_H": COMBINE_BLOCK_H,
    }
    return compile_kernel(kernel.combine_kernel, signature, constants, {"num_warps": 4, "enable_fp_fusion": False})


def compile_routing(shape: Shape, *, renormalize: bool) -> Binary:
    """gated_topk for a decode step."""
    pointers = {
        "logits_ptr": "*fp32", "gate_ptr": "*i64", "unit_ptr": "*u8", "bias_ptr": "*fp32", "mass_ptr": "*i64",
        "chosen_ptr": "*i64", "weights_ptr": "*fp32", "ids_ptr": "*i32", "tokens": "i32",
    }  # fmt: skip
    block_e, units = 1 << (shape.slots - 1).bit_length(), min(shape.slots, MAX_UNITS)
    constants = {
        "EXPERTS": shape.slots, "UNITS": units, "TOP_K": shape.top_k, "RENORMALIZE": renormalize, "FILL": -1,
        "HAS_BIAS": False, "BLOCK_T": max(1, 256 // block_e), "BLOCK_E": block_e, "BLOCK_U": min(block_e, MAX_UNITS),
    }  # fmt: skip
    return compile_kernel(gated_topk_kernel, pointers, constants, {"num_warps": 1, "enable_fp_fusion": False})


def _weights(product: ProductTile, use_tma: bool) -> str:
    return f"tensordesc<bf16[1,{product.block_n},{product.block_d}]>" if use_tma else "*bf16"


def _sizes(shape: Shape, block_t: int, product: ProductTile) -> dict[str, int]:
    return {
        "HIDDEN": shape.hidden,
        "INTERMEDIATE": shape.intermediate,
        "BLOCK_T": block_t,
        "BLOCK_N": product.block_n,
        "BLOCK_D": product.block_d,
        "GROUP": product.group,
        "PROGRAMS": _H200_MULTIPROCESSORS,
    }


def _options(product: ProductTile) -> dict[str, int | bool]:
    return {"num_warps": product.warps, "num_stages": product.stages, "enable_fp_fusion": False}
