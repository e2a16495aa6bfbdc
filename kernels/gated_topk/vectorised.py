"""`gated_topk` for CPU tensors where no C compiler is at hand: NumPy over the tensors' own memory.

The exponential alone comes from torch, so that the results equal the reference's to the last bit.

Shape suffixes: T tokens, E expert slots, K chosen experts.
"""

import numpy as np
import torch
from torch import Tensor

from flexgate.kernels.gated_topk.contract import FILL_FIRST, MASS_SCALE, MAX_SLOTS

_MINUS_INF = np.float32(-np.inf)
_ZERO = np.float32(0)
_MASS_SCALE = np.float32(MASS_SCALE)
_BIT_E = np.left_shift(np.int64(1), np.arange(MAX_SLOTS, dtype=np.int64))
# Index −1, the id of an unused pick, finds the last entry: no bit.
_BIT_OF_ID = np.append(_BIT_E, np.int64(0))


def gated_topk_vectorised(
    router_logits_TE: Tensor,
    gate_T: Tensor,
    bias_E: Tensor | None,
    mass_TE: Tensor,
    chosen_T: Tensor,
    top_k: int,
    renormalize: bool,
    fill: int,
) -> tuple[Tensor, Tensor]:
    """See `gated_topk_reference`; equal to it bit for bit, attribution included."""
    prob = router_logits_TE.clone() if bias_E is None else router_logits_TE + bias_E
    prob_TE = prob.numpy()
    tokens, slots = prob_TE.shape
    excluded_TE = np.equal(gate_T.numpy()[:, None] & _BIT_E[:slots], 0)

    # NaN arises from a corrupt allowed expert or a token with nothing allowed; both are defined, neither is news.
    with np.errstate(invalid="ignore"):
        np.putmask(prob_TE, excluded_TE, _MINUS_INF)
        prob_TE -= np.maximum.reduce(prob_TE, axis=1, keepdims=True)
        prob.exp_()
        # `accumulate` is a left fold by definition; `sum` is pairwise.
        prob_TE /= np.add.accumulate(prob_TE, axis=1)[:, -1:]

        key_TE = np.fmax(prob_TE, _ZERO)
        np.putmask(key_TE, excluded_TE, np.float32(-1))
        order_TK = np.negative(key_TE, out=key_TE).argsort(axis=1, kind="stable")[:, :top_k]
        pick_TK = order_TK + np.arange(0, tokens * slots, slots)[:, None]
        unused_TK = excluded_TE.take(pick_TK)
        weights_TK = prob_TE.take(pick_TK)
        np.putmask(weights_TK, unused_TK, _ZERO)
        if renormalize:
            weights_TK /= np.add.accumulate(weights_TK, axis=1)[:, -1:]
            np.putmask(weights_TK, unused_TK, _ZERO)
        ids_TK = order_TK.astype(np.int32)
        np.putmask(ids_TK, unused_TK, np.int32(-1))

        # A token's ranks name distinct slots, so the buffered indexed addition loses nothing; an unused one adds 0.
        mass = mass_TE.numpy().reshape(-1)
        mass[pick_TK] += np.rint(np.fmax(weights_TK, _ZERO) * _MASS_SCALE).astype(np.int64)
        chosen_T.numpy()[:tokens] |= np.bitwise_or.reduce(_BIT_OF_ID.take(ids_TK), axis=1)

    if top_k > slots:
        beyond = ((0, 0), (0, top_k - slots))
        weights_TK = np.pad(weights_TK, beyond)
        ids_TK = np.pad(ids_TK, beyond, constant_values=-1)
    if fill == FILL_FIRST:
        np.copyto(ids_TK, np.maximum(ids_TK[:, :1], 0), where=ids_TK < 0)
    elif fill >= 0:
        np.putmask(ids_TK, ids_TK < 0, np.int32(fill))
    return torch.from_numpy(weights_TK), torch.from_numpy(ids_TK)
