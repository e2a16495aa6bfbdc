"""Launches the four kernels of one gated expert layer, on a device or in the interpreter.

Shape suffixes: T tokens, E expert slots, K chosen experts, H hidden, F expert intermediate, G = 2F, P picks.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from flexgate.kernels.gated_experts import kernel
from flexgate.kernels.gated_experts.plan import RoutingPlan, empty_plan
from flexgate.kernels.gated_experts.tiles import ProductTile, Tiles

COMBINE_BLOCK_H = 1024
_PLAN_CELLS = 8192


@dataclass(frozen=True)
class Kernels:
    """The four kernels as something to launch, and what the place where they run needs."""

    plan: Any
    gate_up: Any
    down: Any
    combine: Any
    programs: int
    """Programs of the persistent grids: about the number of multiprocessors."""
    use_tma: bool


def device_kernels(device: torch.device) -> Kernels:
    """The compiled kernels for one CUDA device; weights go through TMA from Hopper on."""
    properties = torch.cuda.get_device_properties(device)
    return Kernels(
        kernel.plan_kernel,
        kernel.gate_up_kernel,
        kernel.down_kernel,
        kernel.combine_kernel,
        programs=properties.multi_processor_count,
        use_tma=properties.major >= 9,
    )


def device_names(device: torch.device) -> tuple[str, str]:
    """(device, family) under which tile tables for a CUDA device are stored."""
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device).replace(" ", "_"), f"sm_{major}{minor}"


def launch_plan(kernels: Kernels, weights_TK: Tensor, ids_TK: Tensor, slots: int, block_t: int) -> RoutingPlan:
    """One program per slot; equal to `routing_plan_reference` wherever that specifies an entry."""
    plan = empty_plan(ids_TK, slots, block_t)
    block_E = triton.next_power_of_2(slots)
    kernels.plan[(slots,)](
        ids_TK,
        weights_TK,
        plan.order_P,
        plan.position_P,
        plan.offsets_E1,
        plan.tile_slot_M,
        plan.tile_row_M,
        plan.tiles_1,
        ids_TK.numel(),
        SLOTS=slots,
        BLOCK_T=block_t,
        BLOCK_P=max(16, min(1024, _PLAN_CELLS // block_E)),
        BLOCK_E=block_E,
        num_warps=8,
    )
    return plan


def launch_gated_experts(
    kernels: Kernels,
    tiles: Tiles,
    x_TH: Tensor,
    w13_EGH: Tensor,
    w2_EHF: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    out_TH: Tensor,
) -> None:
    """Write the layer's output into out_TH: four launches, no synchronisation."""
    if len(ids_TK) == 0:
        return
    x_TH, weights_TK, ids_TK = x_TH.contiguous(), weights_TK.contiguous(), ids_TK.contiguous()
    plan = launch_plan(kernels, weights_TK, ids_TK, len(w2_EHF), tiles.block_t)
    hidden_PF = launch_gate_up(kernels, tiles.block_t, tiles.gate_up, x_TH, w13_EGH, plan)
    expert_PH = launch_down(kernels, tiles.block_t, tiles.down, hidden_PF, w2_EHF, plan)
    _launch_combine(kernels, expert_PH, weights_TK, plan, out_TH)


def launch_gate_up(
    kernels: Kernels, block_t: int, product: ProductTile, x_TH: Tensor, w13_EGH: Tensor, plan: RoutingPlan
) -> Tensor:
    """The hidden activation of every real pick, [P, F], in the plan's order; rows beyond it are unwritten."""
    slots, rows, hidden = w13_EGH.shape
    picks, intermediate = len(plan.order_P), rows // 2
    hidden_PF = x_TH.new_empty(picks, intermediate)
    w13, use_tma = _weights(kernels, w13_EGH.view(slots * 2, intermediate, hidden), product)
    kernels.gate_up[(kernels.programs,)](
        x_TH,
        w13,
        hidden_PF,
        plan.order_P,
        *_tile_list(plan),
        HIDDEN=hidden,
        INTERMEDIATE=intermediate,
        TOP_K=picks // len(x_TH),
        USE_TMA=use_tma,
        **_options(kernels, block_t, product),
    )
    return hidden_PF


def launch_down(
    kernels: Kernels, block_t: int, product: ProductTile, hidden_PF: Tensor, w2_EHF: Tensor, plan: RoutingPlan
) -> Tensor:
    """Every real pick's expert output, fp32 [P, H], in the plan's order; rows beyond it are unwritten."""
    _, hidden, intermediate = w2_EHF.shape
    expert_PH = hidden_PF.new_empty(len(hidden_PF), hidden, dtype=torch.float32)
    w2, use_tma = _weights(kernels, w2_EHF, product)
    kernels.down[(kernels.programs,)](
        hidden_PF,
        w2,
        expert_PH,
        *_tile_list(plan),
        HIDDEN=hidden,
        INTERMEDIATE=intermediate,
        USE_TMA=use_tma,
        **_options(kernels, block_t, product),
    )
    return expert_PH


def _launch_combine(kernels: Kernels, expert_PH: Tensor, weights_TK: Tensor, plan: RoutingPlan, out_TH: Tensor) -> None:
    tokens, top_k = weights_TK.shape
    hidden = expert_PH.shape[1]
    block_H = min(COMBINE_BLOCK_H, triton.next_power_of_2(hidden))
    kernels.combine[(tokens, triton.cdiv(hidden, block_H))](
        expert_PH,
        weights_TK,
        plan.position_P,
        out_TH,
        HIDDEN=hidden,
        TOP_K=top_k,
        BLOCK_K=triton.next_power_of_2(top_k),
        BLOCK_H=block_H,
        num_warps=4,
        enable_fp_fusion=False,
    )


def _tile_list(plan: RoutingPlan) -> tuple[Tensor, ...]:
    return plan.offsets_E1, plan.tile_slot_M, plan.tile_row_M, plan.tiles_1


def _options(kernels: Kernels, block_t: int, product: ProductTile) -> dict[str, Any]:
    return {
        "BLOCK_T": block_t,
        "BLOCK_N": product.block_n,
        "BLOCK_D": product.block_d,
        "GROUP": product.group,
        "PROGRAMS": kernels.programs,
        "num_warps": product.warps,
        "num_stages": product.stages,
        "enable_fp_fusion": False,
    }


def _weights(kernels: Kernels, planes: Tensor, product: ProductTile) -> tuple[Any, bool]:
    """A [planes, rows, columns] array as the kernels take it: a descriptor where TMA can address it, else itself."""
    aligned = planes.shape[2] * planes.element_size() % 16 == 0 and planes.data_ptr() % 16 == 0
    if not (kernels.use_tma and aligned):
        return planes, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(planes, [1, product.block_n, product.block_d]), True
