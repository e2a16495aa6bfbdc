"""`gated_experts` on every device: operators of `torch.ops.flexgate`, opaque to torch.compile.

`gated_experts` computes full experts alone, `gated_experts_of_sizes` also smaller ones, so that who has none pays for
nothing.

Shape suffixes: T tokens, E slots of full experts, K chosen experts, H hidden, F expert intermediate, G = 2F.
"""

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexgate.kernels.errors import KernelArgumentError, KernelUnavailableError
from flexgate.kernels.gated_experts.contract import LowRankExperts, NarrowExperts, Smaller, check_arguments
from flexgate.kernels.gated_experts.reference import gated_experts_reference

_LEAST_CAPABILITY = (8, 0)
_LIBRARY = torch.library.Library("flexgate", "FRAGMENT")
_LIBRARY.define(
    "gated_experts(Tensor x_TH, Tensor w13_EGH, Tensor w2_EHF, Tensor weights_TK, Tensor ids_TK, "
    "Tensor(a!) out_TH) -> ()"
)
_LIBRARY.define(
    "gated_experts_of_sizes(Tensor x_TH, Tensor w13_EGH, Tensor w2_EHF, Tensor weights_TK, Tensor ids_TK, "
    "Tensor[] smaller, int[] counts, Tensor(a!) out_TH) -> ()"
)


def gated_experts(
    x_TH: Tensor,
    w13_EGH: Tensor,
    w2_EHF: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    *,
    smaller: Smaller = (),
    out_TH: Tensor | None = None,
) -> Tensor:
    """The chosen experts' SwiGLU networks, weighted and added up; `gated_experts_reference` is the specification.

    Takes routing as `gated_topk` or any other router gives it, and the experts in vLLM's layout: w13_EGH holds the F
    gate rows and then the F up rows of each slot. Slots of `smaller` sizes have the ids after those; they are computed
    on CPU alone. Writes into out_TH where it is given. For inference only.
    """
    check_arguments(x_TH, w13_EGH, w2_EHF, weights_TK, ids_TK, smaller)
    if out_TH is None:
        out_TH = torch.empty_like(x_TH, memory_format=torch.contiguous_format)
    elif out_TH.shape != x_TH.shape or out_TH.dtype is not x_TH.dtype or not out_TH.is_contiguous():
        raise KernelArgumentError(f"out_TH must be contiguous {x_TH.dtype} {list(x_TH.shape)}")
    if not smaller:
        _OPERATOR(x_TH, w13_EGH, w2_EHF, weights_TK, ids_TK, out_TH)
        return out_TH
    if x_TH.device.type == "cuda":
        raise KernelUnavailableError("low-rank experts or a width are computed on CPU alone")
    parts = [tensor for group in smaller for tensor in group.tensors]
    counts = [len(group.tensors) for group in smaller]
    _OPERATOR_OF_SIZES(x_TH, w13_EGH, w2_EHF, weights_TK, ids_TK, parts, counts, out_TH)
    return out_TH


def gated_experts_implementation(device: torch.device) -> str:
    """What computes the operator on `device`, in a few words; raises KernelUnavailableError where nothing can."""
    if device.type == "cpu":
        return "torch reference"
    if device.type != "cuda" or torch.version.hip is not None:
        raise KernelUnavailableError(f"{device} is neither an NVIDIA GPU nor a CPU")
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        raise KernelUnavailableError(
            f"{name} has compute capability {capability[0]}.{capability[1]}; bfloat16 matrix products need 8.0"
        )
    if importlib.util.find_spec("triton") is None:
        raise KernelUnavailableError("Triton is not installed; torch for CUDA brings it along")
    return f"Triton on {name}"


def _cpu(x_TH: Tensor, w13_EGH: Tensor, w2_EHF: Tensor, weights_TK: Tensor, ids_TK: Tensor, out_TH: Tensor) -> None:
    out_TH.copy_(gated_experts_reference(x_TH, w13_EGH, w2_EHF, weights_TK, ids_TK))


def _cpu_of_sizes(
    x_TH: Tensor,
    w13_EGH: Tensor,
    w2_EHF: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    parts: Sequence[Tensor],
    counts: Sequence[int],
    out_TH: Tensor,
) -> None:
    rest = iter(parts)
    groups = [[next(rest) for _ in range(count)] for count in counts]
    smaller = [_KINDS[len(group)](*group) for group in groups]
    out_TH.copy_(gated_experts_reference(x_TH, w13_EGH, w2_EHF, weights_TK, ids_TK, smaller))


def _cuda(x_TH: Tensor, w13_EGH: Tensor, w2_EHF: Tensor, weights_TK: Tensor, ids_TK: Tensor, out_TH: Tensor) -> None:
    # A process that serves from the CPU never pays for importing Triton's front end.
    from flexgate.kernels.gated_experts.launch import launch_gated_experts

    _, hidden, intermediate = w2_EHF.shape
    kernels, table = _device(x_TH.device, hidden, intermediate, str(x_TH.dtype).removeprefix("torch."))
    launch_gated_experts(kernels, table.choose(len(x_TH)), x_TH, w13_EGH, w2_EHF, weights_TK, ids_TK, out_TH)


@functools.cache
def _device(device: torch.device, hidden: int, intermediate: int, dtype: str) -> Any:
    from flexgate.kernels.gated_experts.launch import device_kernels, device_names
    from flexgate.kernels.gated_experts.tiles import tile_table

    return device_kernels(device), tile_table(hidden, intermediate, dtype, *device_names(device))


def _fake(*arguments: Any) -> None:
    """Nothing to say about shapes: the only result is written into an argument."""


_LIBRARY.impl("gated_experts", _cpu, "CPU")
_LIBRARY.impl("gated_experts", _cuda, "CUDA")
torch.library.register_fake("flexgate::gated_experts", _fake, lib=_LIBRARY)
_LIBRARY.impl("gated_experts_of_sizes", _cpu_of_sizes, "CPU")
torch.library.register_fake("flexgate::gated_experts_of_sizes", _fake, lib=_LIBRARY)
_OPERATOR = torch.ops.flexgate.gated_experts.default
_OPERATOR_OF_SIZES = torch.ops.flexgate.gated_experts_of_sizes.default
_KINDS = {2: NarrowExperts, 4: LowRankExperts}  # by their number of tensors
