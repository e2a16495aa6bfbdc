"""What `gated_topk` takes, on every device: limits, units, the meaning of `fill`, checks that do not synchronise.

A gate is one int64 per token that names at most 64 *units*: bit `u` allows unit `u`. Each layer maps its experts to
units with `unit_E`; an expert takes part where the bit of its unit is set. Unit 0 is common: without an owner, in every
gate. A layer need not have an expert of it.

Shape suffixes: T tokens, E experts of the layer, U units, K chosen experts.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from flexgate.kernels.errors import KernelArgumentError

Fill = Literal["none", "first"] | int

MAX_UNITS = 64
"""Bits of a gate; with 64 units bit 63 is the sign bit."""

MAX_EXPERTS = 512
"""Experts of one layer."""

COMMON_UNIT = 0
"""The unit without an owner, in every gate; 63 others can be owned."""

CLOSED_GATE = 1 << COMMON_UNIT
"""The row of padding and of tokens without a request: the common unit alone."""

MASS_SCALE = 2**32
"""Units of `mass_TU` per unit of routing weight. 2**31 real picks of weight 1 fit one int64 counter."""

FILL_NONE = -1
FILL_FIRST = -2


def unit_map(units: Sequence[int]) -> Tensor:
    """`unit_E` of a layer whose expert `e` belongs to `units[e]`.

    Raises:
        KernelArgumentError: no expert, too many, or a unit that no gate can name.
    """
    if not 1 <= len(units) <= MAX_EXPERTS:
        raise KernelArgumentError(f"a layer has 1..{MAX_EXPERTS} experts, got a map of {len(units)}")
    for expert, unit in enumerate(units):
        if not 0 <= unit < MAX_UNITS:
            raise KernelArgumentError(f"expert {expert} is mapped to unit {unit}; units are 0..{MAX_UNITS - 1}")
    return torch.tensor(list(units), dtype=torch.uint8)


def encode_fill(fill: Fill, experts: int) -> int:
    """The integer under which `fill` travels through the operator's schema: an expert, or FILL_NONE, FILL_FIRST."""
    if fill == "none":
        return FILL_NONE
    if fill == "first":
        return FILL_FIRST
    if isinstance(fill, int) and not isinstance(fill, bool) and 0 <= fill < experts:
        return fill
    raise KernelArgumentError(f'fill must be "none", "first" or an expert in 0..{experts - 1}, got {fill!r}')


def check_arguments(
    router_logits_TE: Tensor,
    gate_T: Tensor,
    unit_E: Tensor,
    bias_E: Tensor | None,
    mass_TU: Tensor,
    chosen_T: Tensor,
    top_k: int,
) -> None:
    """Raise KernelArgumentError unless shapes, dtypes and layout fit; looks at no value of any tensor."""
    if router_logits_TE.dim() != 2 or router_logits_TE.dtype is not torch.float32:
        raise _wrong("router_logits_TE", router_logits_TE, "float32 [T, E]")
    tokens, experts = router_logits_TE.shape
    if not 1 <= experts <= MAX_EXPERTS:
        raise KernelArgumentError(f"router_logits_TE has {experts} experts; a layer has 1..{MAX_EXPERTS}")
    if top_k < 1:
        raise KernelArgumentError(f"top_k must be at least 1, got {top_k}")
    if gate_T.dtype is not torch.int64 or gate_T.shape != (tokens,):
        raise _wrong("gate_T", gate_T, f"int64 [{tokens}]")
    if unit_E.dtype is not torch.uint8 or unit_E.shape != (experts,):
        raise _wrong("unit_E", unit_E, f"uint8 [{experts}]")
    if bias_E is not None and (bias_E.dtype is not torch.float32 or bias_E.shape != (experts,)):
        raise _wrong("bias_E", bias_E, f"float32 [{experts}]")
    if mass_TU.dtype is not torch.int64 or mass_TU.dim() != 2 or len(mass_TU) < tokens:
        raise _wrong("mass_TU", mass_TU, f"int64 [>={tokens}, U]")
    if not 1 <= mass_TU.shape[1] <= MAX_UNITS:
        raise KernelArgumentError(f"mass_TU has {mass_TU.shape[1]} units; a gate names 1..{MAX_UNITS}")
    if chosen_T.dtype is not torch.int64 or chosen_T.dim() != 1 or len(chosen_T) < tokens:
        raise _wrong("chosen_T", chosen_T, f"int64 [>={tokens}]")
    # A reshaped copy would swallow the accumulation.
    if not (mass_TU.is_contiguous() and chosen_T.is_contiguous()):
        raise KernelArgumentError("mass_TU and chosen_T are accumulated in place and must be contiguous")


def empty_results(router_logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """weights_TK and ids_TK, not written yet."""
    weights_TK = router_logits_TE.new_empty((router_logits_TE.shape[0], top_k))
    return weights_TK, torch.empty_like(weights_TK, dtype=torch.int32)


def _wrong(name: str, tensor: Tensor, expected: str) -> KernelArgumentError:
    return KernelArgumentError(f"{name} must be {expected}, got {tensor.dtype} {list(tensor.shape)}")
