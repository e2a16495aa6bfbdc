"""Routing by scores: every expert's sigmoid, corrected for choosing alone, within the best groups of experts.

This is how GLM-4-MoE and DeepSeek-V3 route, gated. `gated_topk` is the kernel of softmax routers; this one is made of
torch operations, the same on every device, and is its own specification.

Shape suffixes: T tokens, E experts of the layer, P the same padded, U units, K chosen experts, G groups.
"""

import torch
from torch import Tensor
from torch.nn import functional

from flexgate.kernels.errors import KernelArgumentError
from flexgate.kernels.gated_topk.contract import (
    FILL_FIRST,
    MASS_SCALE,
    MAX_UNITS,
    Fill,
    check_arguments,
    encode_fill,
)
from flexgate.kernels.gated_topk.reference import exponential_reference

LEAST_SUM = 1e-20
"""Added to the sum that weights are divided by, as transformers does."""
BEST_OF_GROUP = 2
"""A group's score is the sum of its best experts', of so many that are allowed."""


def gated_scores(
    router_logits_TP: Tensor,
    gate_T: Tensor,
    *,
    unit_E: Tensor,
    top_k: int,
    renormalize: bool,
    correction_E: Tensor,
    groups: int,
    open_groups: int,
    scale: float,
    mass_TU: Tensor,
    chosen_T: Tensor,
    fill: Fill,
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts among those whose unit its gate names.

    With A(t) the allowed experts, as in `gated_topk_reference`:

        x(t, e) = exp(−|router_logits[t, e]|)                   in fp32, see exponential.py
        s(t, e) = 1 / (1 + x), of a negative logit x / (1 + x)  which is its sigmoid
        c(t, e) = s(t, e) + correction[e]                       for e in A(t), −inf elsewhere
        open(t) = the first open_groups groups by the sum of c over their min(2, allowed) best; none without an allowed
        ids(t)  = the first min(top_k, …) of A(t) in open(t) by (c descending, expert ascending)
        w(t, k) = s(t, ids(t, k)), with renormalize divided by their sum, a left fold in rank order, times scale

    Groups go by an expert's place: excluding an expert leaves a hole, and does not move the others to other groups.
    With one group, excluding equals removing bit for bit. What an excluded expert holds is selected away, never added.
    Unused picks, `fill`, NaN and the attribution are as in `gated_topk_reference`; the mass is of weights before scale.

    Args:
        router_logits_TP: fp32; what lies beyond the experts is not read.
        correction_E: fp32.

    Returns weights_TK fp32 and ids_TK int32. Raises KernelArgumentError for shapes and numbers that do not fit.
    """
    experts, tokens = len(unit_E), len(router_logits_TP)
    check_arguments(router_logits_TP[:, :experts], gate_T, unit_E, correction_E, mass_TU, chosen_T, top_k)
    if experts % groups or not 1 <= open_groups <= groups:
        raise KernelArgumentError(f"{open_groups} of {groups} groups of {experts} experts cannot be open")
    filler, units = encode_fill(fill, experts), mass_TU.shape[1]
    unit_of_E = unit_E.long()
    named_TE = (gate_T[:, None] >> unit_of_E.clamp(max=MAX_UNITS - 1)) & 1 != 0
    allowed_TE = named_TE & (unit_of_E < units)

    score_TE = _sigmoid(router_logits_TP[:, :experts])
    key_TE = torch.where(allowed_TE, score_TE + correction_E, float("-inf"))
    if groups > 1:
        key_TE = torch.where(_is_open(key_TE, groups, open_groups), key_TE, float("-inf"))
    key_TE, order_TE = key_TE.sort(dim=1, descending=True, stable=True)
    beyond = (0, max(0, top_k - experts))
    order_TK = functional.pad(order_TE[:, :top_k], beyond)
    real_TK = functional.pad(key_TE[:, :top_k], beyond, value=float("-inf")) != float("-inf")

    weights_TK = torch.where(real_TK, score_TE.gather(1, order_TK), 0.0)
    if renormalize:
        weights_TK = weights_TK / (_left_fold(weights_TK) + LEAST_SUM)[:, None]
    _attribute(weights_TK, unit_of_E[order_TK].clamp(max=units - 1), real_TK, mass_TU[:tokens], chosen_T[:tokens])
    unused_TK = torch.where(real_TK, order_TK, filler)
    if filler == FILL_FIRST:
        unused_TK = torch.where(real_TK, order_TK, torch.where(real_TK[:, :1], order_TK[:, :1], 0))
    return weights_TK * scale, unused_TK.int()


def _sigmoid(logits_TE: Tensor) -> Tensor:
    """The same bits at every place and with any number of threads: torch's own ends each thread's part with scalars."""
    exp_TE = exponential_reference(-logits_TE.abs())
    return torch.where(logits_TE < 0, exp_TE, 1.0) / (1.0 + exp_TE)


def _left_fold(weights_TK: Tensor) -> Tensor:
    """The sum of each token's weights, in rank order."""
    sum_T = torch.zeros_like(weights_TK[:, 0])
    for rank in range(weights_TK.shape[1]):
        sum_T = sum_T + weights_TK[:, rank]
    return sum_T


def _is_open(key_TE: Tensor, groups: int, open_groups: int) -> Tensor:
    """Whether an expert is in one of the best groups; a group without an allowed expert is the last."""
    tokens, experts = key_TE.shape
    best_TGB = key_TE.view(tokens, groups, -1).sort(dim=2, descending=True).values[:, :, :BEST_OF_GROUP]
    empty_TG = best_TGB[:, :, 0] == float("-inf")
    sum_TG = torch.where(best_TGB == float("-inf"), 0.0, best_TGB).sum(dim=2)
    score_TG = torch.where(empty_TG, float("-inf"), sum_TG)
    first_TG = score_TG.sort(dim=1, descending=True, stable=True).indices[:, :open_groups]
    open_TG = torch.zeros_like(empty_TG).scatter(1, first_TG, True)
    return open_TG[:, :, None].expand(-1, -1, experts // groups).reshape(tokens, experts)


def _attribute(weights_TK: Tensor, unit_TK: Tensor, real_TK: Tensor, mass_TU: Tensor, chosen_T: Tensor) -> None:
    """Add up what each unit was given, NaN counting 0, and note which units were chosen; in place."""
    fixed_TK = (weights_TK.nan_to_num(nan=0.0).double() * MASS_SCALE).round().long()
    mass_TU.scatter_add_(1, unit_TK, fixed_TK)
    bit_TK = torch.where(real_TK, torch.ones_like(unit_TK) << unit_TK, 0)
    for rank in range(bit_TK.shape[1]):
        chosen_T.bitwise_or_(bit_TK[:, rank])
