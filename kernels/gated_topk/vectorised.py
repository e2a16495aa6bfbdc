"""`gated_topk` for CPU tensors where no C compiler is at hand: NumPy over the tensors' own memory.

Shape suffixes: T tokens, E experts of the layer, U units, K chosen experts.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flexgate.kernels.gated_topk.contract import FILL_FIRST, MASS_SCALE, MAX_UNITS
from flexgate.kernels.gated_topk.exponential import (
    COEFFICIENTS,
    EXPONENT_BIAS,
    LEAST,
    LN2_HIGH,
    LN2_LOW,
    LOG2_E,
    MANTISSA_BITS,
)

Float32Array = npt.NDArray[np.float32]

_MINUS_INF = np.float32(-np.inf)
_ZERO = np.float32(0)
_SCALE = np.float32(MASS_SCALE)
_BIT_OF_UNIT = np.where(np.arange(256) < MAX_UNITS, np.left_shift(1, np.arange(256) % MAX_UNITS), 0)


def gated_topk_vectorised(
    router_logits_TE: Tensor,
    gate_T: Tensor,
    unit_E: Tensor,
    bias_E: Tensor | None,
    mass_TU: Tensor,
    chosen_T: Tensor,
    top_k: int,
    renormalize: bool,
    fill: int,
) -> tuple[Tensor, Tensor]:
    """See `gated_topk_reference`; equal to it bit for bit, attribution included."""
    logits_TE = (router_logits_TE.clone() if bias_E is None else router_logits_TE + bias_E).numpy()
    tokens, experts = logits_TE.shape
    units = mass_TU.shape[1]
    # No column and no bit for a unit that no gate can name.
    cell_E = unit_E.numpy().astype(np.int64)
    bit_E = _BIT_OF_UNIT.take(cell_E)
    np.putmask(bit_E, cell_E >= units, 0)
    np.putmask(cell_E, cell_E >= units, 0)
    excluded_TE = np.equal(gate_T.numpy()[:, None] & bit_E, 0)

    # NaN arises from a corrupt allowed expert or a token with nothing allowed; both are defined, neither is news.
    with np.errstate(invalid="ignore"):
        prob_TE = _probabilities(logits_TE, excluded_TE)
        key_TE = np.fmax(prob_TE, _ZERO)
        np.putmask(key_TE, excluded_TE, np.float32(-1))
        order_TK = np.negative(key_TE, out=key_TE).argsort(axis=1, kind="stable")[:, :top_k]
        pick_TK = order_TK + np.arange(0, tokens * experts, experts)[:, None]
        unused_TK = excluded_TE.take(pick_TK)
        weights_TK = prob_TE.take(pick_TK)
        np.putmask(weights_TK, unused_TK, _ZERO)
        if renormalize:
            # `accumulate` is a left fold by definition; `sum` is pairwise.
            weights_TK /= np.add.accumulate(weights_TK, axis=1)[:, -1:]
            np.putmask(weights_TK, unused_TK, _ZERO)
        ids_TK = order_TK.astype(np.int32)
        np.putmask(ids_TK, unused_TK, np.int32(-1))

        # Unbuffered, since several picks of a token may belong to one unit; an unused one adds 0.
        cell_TK = cell_E.take(order_TK) + np.arange(0, tokens * units, units)[:, None]
        mass_TK = np.rint(np.fmax(weights_TK, _ZERO) * _SCALE).astype(np.int64)
        np.add.at(mass_TU.numpy().reshape(-1), cell_TK.reshape(-1), mass_TK.reshape(-1))
        chosen_TK = bit_E.take(order_TK)
        np.putmask(chosen_TK, unused_TK, 0)
        chosen_T.numpy()[:tokens] |= np.bitwise_or.reduce(chosen_TK, axis=1)

    if top_k > experts:
        beyond = ((0, 0), (0, top_k - experts))
        weights_TK = np.pad(weights_TK, beyond)
        ids_TK = np.pad(ids_TK, beyond, constant_values=-1)
    if fill == FILL_FIRST:
        np.copyto(ids_TK, np.maximum(ids_TK[:, :1], 0), where=ids_TK < 0)
    elif fill >= 0:
        np.putmask(ids_TK, ids_TK < 0, np.int32(fill))
    return torch.from_numpy(weights_TK), torch.from_numpy(ids_TK)


def _probabilities(logits_TE: Float32Array, excluded_TE: npt.NDArray[np.bool_]) -> Float32Array:
    np.putmask(logits_TE, excluded_TE, _MINUS_INF)
    exp_TE = _exponential(logits_TE - np.maximum.reduce(logits_TE, axis=1, keepdims=True))
    sum_T = np.add.reduce(np.rint(exp_TE * _SCALE).astype(np.int64), axis=1).astype(np.float32) / _SCALE
    np.putmask(sum_T, np.isnan(exp_TE).any(axis=1), np.float32(np.nan))
    exp_TE /= sum_T[:, None]
    return exp_TE


def _exponential(shifted: Float32Array) -> Float32Array:
    """See exponential.py."""
    d = np.maximum(shifted, np.float32(LEAST)).astype(np.float64)
    n = np.rint(d * LOG2_E)
    r = (d - n * LN2_HIGH) - n * LN2_LOW
    polynomial = np.full_like(r, COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        polynomial *= r
        polynomial += coefficient
    power = ((n.astype(np.int64) + EXPONENT_BIAS) << MANTISSA_BITS).view(np.float64)
    return (polynomial * power).astype(np.float32)
