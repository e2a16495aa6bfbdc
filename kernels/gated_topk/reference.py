"""The specification of `gated_topk`, in plain fp32 torch.

Shape suffixes: T tokens, E expert slots, K chosen experts.
"""

import torch
from torch import Tensor, exp

from flexgate.kernels.errors import KernelArgumentError
from flexgate.kernels.gated_topk.contract import (
    FILL_FIRST,
    MASS_SCALE,
    Fill,
    check_arguments,
    encode_fill,
)


def gated_topk_reference(
    router_logits_TE: Tensor,
    gate_T: Tensor,
    *,
    top_k: int,
    renormalize: bool,
    bias_E: Tensor | None,
    mass_TE: Tensor,
    chosen_T: Tensor,
    fill: Fill,
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts among those that its gate allows.

    With A(t) the slots whose bit is set in gate_T[t], and every sum a left fold in fp32:

        l(t, e) = router_logits_TE[t, e] + bias_E[e]                    for e in A(t), −inf elsewhere
        p(t, e) = exp(l(t, e) − max l(t)) / Σ_e exp(l(t, e) − max l(t))  summed in slot order
        ids(t)  = the first min(top_k, |A(t)|) of A(t) by (p descending, slot ascending)
        w(t, k) = p(t, ids(t, k)), with renormalize divided by Σ_k of them, summed in rank order

    An excluded slot contributes exp(−inf) = 0, and adding 0 changes no partial sum, so excluding a slot equals
    removing it bit for bit, whether the hole stays or the remaining slots move together. Ranking puts an allowed
    slot whose p underflowed to 0 before every excluded one.

    Where fewer than top_k slots are allowed the unused picks have weight exactly 0 and the id that `fill` names:
    "none" → −1, "first" → the token's own first pick, a slot → that slot. A NaN or +inf logit in an *allowed* slot
    makes every picked weight of that token NaN (and the ids stay within the gate).

    router_logits_TE: fp32; gate_T: int64 bitmask, bits from E up are ignored; bias_E: fp32 or None.
    mass_TE (int64, at least T rows) += round_half_even(w · MASS_SCALE) at each real pick, NaN counting 0.
    chosen_T (int64, at least T entries) |= 1 << id of each real pick. Rows from T up are not touched; integers, so
    the order in which layers or devices accumulate cannot matter. The caller zeroes both before each step.

    Returns weights_TK fp32 and ids_TK int32. Raises KernelArgumentError where a token is allowed nothing and fill is
    "first": there is no honest id to repeat. (The operator cannot look at values without a synchronisation; it emits
    slot 0 at weight 0 there, and its callers give padding rows a gate that is never empty.)
    """
    check_arguments(router_logits_TE, gate_T, bias_E, mass_TE, chosen_T, top_k)
    tokens, slots = router_logits_TE.shape
    filler = encode_fill(fill, slots)

    slot_E = torch.arange(slots)
    allowed_TE = ((gate_T[:, None] >> slot_E) & 1).bool()
    if filler == FILL_FIRST and not bool(allowed_TE.any(dim=1).all()):
        raise KernelArgumentError('fill="first" needs at least one allowed slot for every token')

    logits_TE = router_logits_TE if bias_E is None else router_logits_TE + bias_E
    logits_TE = torch.where(allowed_TE, logits_TE, float("-inf"))
    exp_TE = exp(logits_TE - logits_TE.amax(dim=1, keepdim=True))
    sum_T = torch.zeros(tokens)
    for slot in range(slots):
        sum_T = sum_T + torch.where(allowed_TE[:, slot], exp_TE[:, slot], 0.0)
    prob_TE = exp_TE / sum_T[:, None]

    weights_TK = torch.zeros(tokens, top_k)
    ids_TK = torch.full((tokens, top_k), max(filler, -1), dtype=torch.int32)
    for token in range(tokens):
        prob_E = prob_TE[token].nan_to_num(nan=0.0).tolist()
        allowed = [slot for slot in range(slots) if allowed_TE[token, slot]]
        picks = sorted(allowed, key=lambda slot: (-prob_E[slot], slot))[:top_k]
        weights_K = [prob_TE[token, slot] for slot in picks]
        if renormalize:
            total = torch.tensor(0.0)
            for weight in weights_K:
                total = total + weight
            weights_K = [weight / total for weight in weights_K]
        for rank, (slot, weight) in enumerate(zip(picks, weights_K, strict=True)):
            weights_TK[token, rank] = weight
            ids_TK[token, rank] = slot
            mass_TE[token, slot] += round(float(weight.nan_to_num(nan=0.0)) * MASS_SCALE)
            chosen_T[token] |= torch.ones((), dtype=torch.int64) << slot
        if filler == FILL_FIRST:
            ids_TK[token, len(picks) :] = picks[0]
    return weights_TK, ids_TK
