"""The specification of `gated_topk`, in plain torch.

Shape suffixes: T tokens, E experts of the layer, U units, K chosen experts.
"""

import torch
from torch import Tensor

from flexgate.kernels.errors import KernelArgumentError
from flexgate.kernels.gated_topk.contract import (
    FILL_FIRST,
    MASS_SCALE,
    Fill,
    check_arguments,
    encode_fill,
)
from flexgate.kernels.gated_topk.exponential import (
    COEFFICIENTS,
    EXPONENT_BIAS,
    LEAST,
    LN2_HIGH,
    LN2_LOW,
    LOG2_E,
    MANTISSA_BITS,
)


def gated_topk_reference(
    router_logits_TE: Tensor,
    gate_T: Tensor,
    *,
    unit_E: Tensor,
    top_k: int,
    renormalize: bool,
    bias_E: Tensor | None,
    mass_TU: Tensor,
    chosen_T: Tensor,
    fill: Fill,
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts among those whose unit its gate names.

    With A(t) the experts e whose unit_E[e] is below U and has its bit set in gate_T[t]:

        l(t, e) = router_logits_TE[t, e] + bias_E[e]            for e in A(t), −inf elsewhere
        x(t, e) = exp(l(t, e) − max l(t))                       in fp32, see exponential.py
        s(t)    = fp32(Σ_e round_half_even(x(t, e) · 2³²)) / 2³²  summed in integers
        p(t, e) = x(t, e) / s(t)
        ids(t)  = the first min(top_k, |A(t)|) of A(t) by (p descending, expert ascending)
        w(t, k) = p(t, ids(t, k)), with renormalize divided by Σ_k of them, a left fold in rank order

    An integer sum has no order and an excluded expert is not in it, so excluding an expert equals removing it bit for
    bit, whether the hole stays or the remaining experts move together. Ranking puts an allowed expert whose p
    underflowed to 0 before every excluded one.

    Where fewer than top_k experts are allowed the unused picks have weight exactly 0 and the id that `fill` names:
    "none" → −1, "first" → the token's own first pick, an expert → that expert. A NaN or +inf logit in an *allowed*
    expert makes every picked weight of that token NaN (and the ids stay within the gate).

    router_logits_TE: fp32; gate_T: int64 bitmask of units; unit_E: uint8; bias_E: fp32 or None. Of a gate the bits from
    U up are ignored, and an expert of such a unit is in no gate.
    mass_TU (int64, at least T rows) += round_half_even(w · MASS_SCALE) in the unit of each real pick, NaN counting 0.
    chosen_T (int64, at least T entries) |= 1 << unit of each real pick. Rows from T up are not touched; integers, so
    the order in which layers or devices accumulate cannot matter. The caller zeroes both before each step.

    Returns weights_TK fp32 and ids_TK int32. Raises KernelArgumentError where a token is allowed nothing and fill is
    "first": there is no honest id to repeat. (The operator cannot look at values without a synchronisation; it emits
    expert 0 at weight 0 there. A gate that leaves a layer without a candidate is refused by those who make gates.)
    """
    check_arguments(router_logits_TE, gate_T, unit_E, bias_E, mass_TU, chosen_T, top_k)
    tokens, experts = router_logits_TE.shape
    filler = encode_fill(fill, experts)

    unit_of = unit_E.tolist()
    units = mass_TU.shape[1]
    allowed_TE = torch.tensor(
        [[unit < units and gate >> unit & 1 == 1 for unit in unit_of] for gate in gate_T.tolist()], dtype=torch.bool
    ).reshape(tokens, experts)
    if filler == FILL_FIRST and not bool(allowed_TE.any(dim=1).all()):
        raise KernelArgumentError('fill="first" needs at least one allowed expert for every token')

    prob_TE = _probabilities(router_logits_TE if bias_E is None else router_logits_TE + bias_E, allowed_TE)
    weights_TK = torch.zeros(tokens, top_k, dtype=torch.float32)
    ids_TK = torch.full((tokens, top_k), max(filler, -1), dtype=torch.int32)
    for token in range(tokens):
        prob_E = prob_TE[token].nan_to_num(nan=0.0).tolist()
        allowed = allowed_TE[token].nonzero().flatten().tolist()
        picks = sorted(allowed, key=lambda expert: (-prob_E[expert], expert))[:top_k]
        weights_K = [prob_TE[token, expert] for expert in picks]
        if renormalize:
            total = torch.tensor(0.0, dtype=torch.float32)
            for weight in weights_K:
                total = total + weight
            weights_K = [weight / total for weight in weights_K]
        for rank, (expert, weight) in enumerate(zip(picks, weights_K, strict=True)):
            weights_TK[token, rank] = weight
            ids_TK[token, rank] = expert
            mass_TU[token, unit_of[expert]] += round(float(weight.nan_to_num(nan=0.0)) * MASS_SCALE)
            chosen_T[token] |= torch.ones((), dtype=torch.int64) << unit_of[expert]
        if filler == FILL_FIRST:
            ids_TK[token, len(picks) :] = picks[0]
    return weights_TK, ids_TK


def _probabilities(logits_TE: Tensor, allowed_TE: Tensor) -> Tensor:
    """p of the specification where allowed; elsewhere 0, or NaN beside a NaN."""
    logits_TE = torch.where(allowed_TE, logits_TE, float("-inf"))
    exp_TE = exponential_reference(logits_TE - logits_TE.amax(dim=1, keepdim=True))
    corrupt_T = (exp_TE.isnan() & allowed_TE).any(dim=1)
    fixed_TE = torch.where(allowed_TE, exp_TE.nan_to_num(nan=0.0), 0.0).double() * MASS_SCALE
    sum_T = fixed_TE.round().long().sum(dim=1).float() / MASS_SCALE
    return exp_TE / torch.where(corrupt_T, float("nan"), sum_T)[:, None]


def exponential_reference(shifted: Tensor) -> Tensor:
    """exp of fp32 arguments that are not positive, as exponential.py defines it."""
    d = shifted.double().clamp(min=LEAST)
    n = (d * LOG2_E).round()
    r = (d - n * LN2_HIGH) - n * LN2_LOW
    polynomial = torch.full_like(r, COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        polynomial = polynomial * r + coefficient
    power = ((n.nan_to_num(nan=0.0).long() + EXPONENT_BIAS) << MANTISSA_BITS).view(torch.float64)
    return (polynomial * power).float()
