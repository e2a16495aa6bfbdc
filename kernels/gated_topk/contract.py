"""What `gated_topk` takes, on every device: limits, the meaning of `fill`, and the checks that cost no synchronisation.

Shape suffixes: T tokens, E expert slots, K chosen experts.
"""

from typing import Literal

import torch
from torch import Tensor

from flexgate.kernels.errors import KernelArgumentError

Fill = Literal["none", "first"] | int

MAX_SLOTS = 64
"""A gate is one int64: bit `e` allows slot `e`; with 64 slots bit 63 is the sign bit."""

MASS_SCALE = 2**32
"""Units of `mass_TE` per unit of routing weight. 2**31 real picks of weight 1 fit one int64 counter."""

FILL_NONE = -1
FILL_FIRST = -2


def encode_fill(fill: Fill, slots: int) -> int:
    """The integer under which `fill` travels through the operator's schema: a slot, or one of FILL_NONE, FILL_FIRST."""
    if fill == "none":
        return FILL_NONE
    if fill == "first":
        return FILL_FIRST
    if isinstance(fill, int) and not isinstance(fill, bool) and 0 <= fill < slots:
        return fill
    raise KernelArgumentError(f'fill must be "none", "first" or a slot in 0..{slots - 1}, got {fill!r}')


def check_arguments(
    router_logits_TE: Tensor, gate_T: Tensor, bias_E: Tensor | None, mass_TE: Tensor, chosen_T: Tensor, top_k: int
) -> None:
    """Raise KernelArgumentError unless shapes, dtypes, layout and devices fit; looks at no value of any tensor."""
    if router_logits_TE.dim() != 2 or router_logits_TE.dtype is not torch.float32:
        raise _wrong("router_logits_TE", router_logits_TE, "float32 [T, E]")
    tokens, slots = router_logits_TE.shape
    if not 1 <= slots <= MAX_SLOTS:
        raise KernelArgumentError(f"router_logits_TE has {slots} slots; a gate holds 1..{MAX_SLOTS}")
    if top_k < 1:
        raise KernelArgumentError(f"top_k must be at least 1, got {top_k}")
    if gate_T.dtype is not torch.int64 or gate_T.shape != (tokens,):
        raise _wrong("gate_T", gate_T, f"int64 [{tokens}]")
    if bias_E is not None and (bias_E.dtype is not torch.float32 or bias_E.shape != (slots,)):
        raise _wrong("bias_E", bias_E, f"float32 [{slots}]")
    if mass_TE.dtype is not torch.int64 or mass_TE.dim() != 2 or mass_TE.shape[1] != slots or len(mass_TE) < tokens:
        raise _wrong("mass_TE", mass_TE, f"int64 [>={tokens}, {slots}]")
    if chosen_T.dtype is not torch.int64 or chosen_T.dim() != 1 or len(chosen_T) < tokens:
        raise _wrong("chosen_T", chosen_T, f"int64 [>={tokens}]")
    # A reshaped copy would swallow the accumulation.
    if not (mass_TE.is_contiguous() and chosen_T.is_contiguous()):
        raise KernelArgumentError("mass_TE and chosen_T are accumulated in place and must be contiguous")


def empty_results(router_logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """weights_TK and ids_TK, not written yet."""
    weights_TK = router_logits_TE.new_empty((router_logits_TE.shape[0], top_k))
    return weights_TK, torch.empty_like(weights_TK, dtype=torch.int32)


def _wrong(name: str, tensor: Tensor, expected: str) -> KernelArgumentError:
    return KernelArgumentError(f"{name} must be {expected}, got {tensor.dtype} {list(tensor.shape)}")
