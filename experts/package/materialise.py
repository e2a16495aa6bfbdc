"""A package's FFN in the width of the model: a narrow one with zeros, factors added to the public expert's.

    W = round( W_public + B A )    products and sum in float32, rounded once to the stored dtype

Factors are added to the very tensors whose digests the package names. The last bit of a product may differ between
processors and BLAS libraries.

Shapes: O output, I input of a projection in the model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn.functional import pad

from flexgate.experts.checkpoint.base import BaseIdentity, read_shared
from flexgate.experts.checkpoint.layout import EXPERT_KEYS
from flexgate.experts.checkpoint.reader import CheckpointReader
from flexgate.experts.io.stream import Piece
from flexgate.experts.io.tensorfile import tensor_bytes
from flexgate.experts.package.size import FACTOR_KEYS, FULL, PROJECTIONS, WHOLE_KEY
from flexgate.experts.package.weights import CheckedWeights, Factors


def ffn_pieces(weights: CheckedWeights, base: BaseIdentity, anchor: CheckpointReader, layer: int) -> list[Piece]:
    """One layer's FFN in the order of ``layout.EXPERT_KEYS``; what is computed is so when it is written.

    Args:
        base: the base model that the package names.
        anchor: a checkpoint of it; its public FFN is compared with ``base`` as it is read.
    """
    pieces = []
    for template, projection in zip(EXPERT_KEYS, PROJECTIONS, strict=True):
        public = template.format(layer=layer, expert=0)
        info = anchor.info(public)
        if weights.ticket.size == FULL:
            chunks = partial(weights.file().chunks, (WHOLE_KEY % projection).format(layer=layer))
            pieces.append(Piece(info.dtype, info.shape, chunks))
            continue
        if weights.ticket.size.rank is None:
            whole = partial(_widened, weights, layer, projection, info.shape)
        else:
            whole = partial(_summed, weights, layer, projection, partial(read_shared, anchor, public, base))
        pieces.append(Piece(info.dtype, info.shape, partial(_one_chunk, whole)))
    return pieces


def _one_chunk(whole: Callable[[], Tensor]) -> tuple[memoryview]:
    return (tensor_bytes(whole()),)


def _widened(weights: CheckedWeights, layer: int, projection: str, shape_OI: tuple[int, ...]) -> Tensor:
    stored = weights.file().read((WHOLE_KEY % projection).format(layer=layer))
    return pad(stored, (0, shape_OI[1] - stored.shape[1], 0, shape_OI[0] - stored.shape[0]))


def _summed(weights: CheckedWeights, layer: int, projection: str, public: Callable[[], Tensor]) -> Tensor:
    factors = Factors(*(weights.file().read((key % projection).format(layer=layer)) for key in FACTOR_KEYS))
    public_OI = public()
    return (public_OI.float() + factors.product()).to(public_OI.dtype)
