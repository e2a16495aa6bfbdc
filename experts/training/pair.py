"""An owner's expert beside the frozen public one (FlexOlmo, section 3.2): what trains, and how its router starts.

The pair's two experts both start as the public FFN. Only the owner's FFN, and its router row and bias where asked, are
parameters of the optimizer; everything else is out of the graph. The bias is at most zero wherever it acts, as in the
paper: ``min(b, 0)`` is added to the owner's logit.

Shapes: N tokens, L layers, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, cast

import numpy
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from flexgate.experts.errors import TrainingRefused
from flexgate.experts.package.weights import ExpertLayer, LowRankLayer
from flexgate.experts.training.batches import Batch
from flexgate.experts.training.low_rank import LowRankFFN
from flexgate.experts.training.model import FlexOlmo, Router
from flexgate.experts.training.objective import pair_from_anchor
from flexgate.experts.training.parallel import shard, whole
from flexgate.experts.training.routing import Samples, fit_row

PUBLIC_FFN: Final = ".mlp.experts.0."
OWNER_FFN: Final = ".mlp.experts.1."


@dataclass(frozen=True)
class Row:
    """The owner's router row of one layer."""

    weight_H: Tensor
    bias: float = 0.0


class PairRouter(nn.Module):
    """Routing between the public expert, whose row is fixed, and the owner's."""

    def __init__(self, public_H: Tensor, row: Row) -> None:
        super().__init__()
        self.register_buffer("public_H", public_H.clone())
        self.row_H = nn.Parameter(row.weight_H.clone())
        self.raw_bias = nn.Parameter(torch.tensor([row.bias]))
        self.logits_N2 = torch.empty(0)
        """Of the latest call, for the z-loss."""

    @property
    def bias(self) -> Tensor:
        """What is added to the owner's logit, shape ``[1]``."""
        return self.raw_bias.clamp(max=0.0)

    def forward(self, x_NH: Tensor, allowed_N2: Tensor | None) -> Tensor:
        """Weights ``[N, 2]``: softmax over both, no selection."""
        weight_2H = torch.stack((self.get_buffer("public_H"), self.row_H))
        self.logits_N2 = F.linear(x_NH, weight_2H).float() + F.pad(self.bias, (1, 0))
        logits_N2 = self.logits_N2
        if allowed_N2 is not None:
            logits_N2 = logits_N2.masked_fill(~allowed_N2, float("-inf"))
        return logits_N2.softmax(-1).to(x_NH.dtype)


def make_pair(anchor: FlexOlmo, rows: Sequence[Row]) -> FlexOlmo:
    """The pair, with nothing trainable yet."""
    pair = pair_from_anchor(anchor)
    _set_routers(pair, public_rows(anchor), rows)
    pair.requires_grad_(False)
    return pair


def make_sharded_pair(anchor: FlexOlmo, rows: Sequence[Row], mesh: DeviceMesh) -> FlexOlmo:
    """``make_pair`` of an anchor that is sharded over ``mesh``, without making anything whole; what stays frozen is the
    anchor's own memory.
    """
    with torch.device("meta"):
        pair = FlexOlmo(replace(anchor.architecture, num_experts=2, num_experts_per_tok=2))
    _set_routers(pair, public_rows(anchor), rows)
    shard(pair, mesh)
    source = {name: value for name, value in anchor.state_dict().items() if ".mlp.gate." not in name}
    owner = {name.replace(PUBLIC_FFN, OWNER_FFN): value.clone() for name, value in source.items() if PUBLIC_FFN in name}
    routing = {name: value for name, value in pair.state_dict().items() if ".mlp.gate." in name}
    pair.load_state_dict({**source, **owner, **routing}, assign=True)
    pair.requires_grad_(False)
    return pair


def public_rows(anchor: FlexOlmo) -> list[Tensor]:
    """The public router row of every layer, on the host, where rows are fitted."""
    return [whole(block.mlp.gate.weight)[0].detach().cpu() for block in anchor.model.blocks]


def _set_routers(pair: FlexOlmo, public: Sequence[Tensor], rows: Sequence[Row]) -> None:
    for block, public_H, row in zip(pair.model.blocks, public, rows, strict=True):
        block.mlp.gate = cast(Router, PairRouter(public_H, row))


def routers(pair: FlexOlmo) -> list[PairRouter]:
    """The routers by layer."""
    return [cast(PairRouter, layer.mlp.gate) for layer in pair.model.blocks]


def trainable(pair: FlexOlmo, layers: Sequence[int], *, train_router: bool) -> dict[str, nn.Parameter]:
    """Thaw the owner's FFN in ``layers``, with the router rows if asked, and name what was thawed."""
    named: dict[str, nn.Parameter] = {}
    for number in layers:
        block = pair.model.blocks[number]
        named |= {f"{number}.ffn.{name}": value for name, value in block.mlp.ffns[1].named_parameters()}
        if train_router:
            named |= {f"{number}.router.{name}": value for name, value in block.mlp.gate.named_parameters()}
    for parameter in named.values():
        parameter.requires_grad_()
    return named


def z_loss(pair: FlexOlmo, batch: Batch) -> Tensor:
    """Mean squared log-sum-exp of the router logits of the latest forward pass, of ``batch``; keeps them small."""
    squares_LN = [router.logits_N2.logsumexp(-1).square() for router in routers(pair)]
    if batch.whole is None:
        return torch.stack([squares_N.mean() for squares_N in squares_LN]).mean()
    real_N = (batch.weights_BT > 0).any(-1, keepdim=True).expand(batch.tokens_BT.shape).flatten()
    return torch.stack([(squares_N * real_N).sum() / batch.whole.tokens_BT.numel() for squares_N in squares_LN]).mean()


def expert_layers(pair: FlexOlmo, dtype: torch.dtype) -> Iterator[ExpertLayer | LowRankLayer]:
    """The owner's part, in the base model's dtype; a bias that is zero in every layer is left out."""
    rows = [_row(block.mlp.gate) for block in pair.model.blocks]
    biases = [torch.tensor([row.bias]).to(dtype) for row in rows]
    biased = any(bias.item() != 0.0 for bias in biases)
    for block, row, bias in zip(pair.model.blocks, rows, biases, strict=True):
        ffn, kept_bias = block.mlp.ffns[1], bias if biased else None
        if isinstance(ffn, LowRankFFN):
            gate_factors, up_factors, down_factors = ffn.factors(dtype)
            row_H = row.weight_H.detach().to(dtype)
            yield LowRankLayer(gate_factors, up_factors, down_factors, row_H, kept_bias)
            continue
        tensors = (ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight, row.weight_H)
        gate, up, down, row_H = (whole(tensor.detach()).to(dtype).cpu() for tensor in tensors)
        yield ExpertLayer(gate, up, down, row_H, kept_bias)


def _row(router: Router | PairRouter) -> Row:
    """The owner's row of either kind of router."""
    if isinstance(router, PairRouter):
        return Row(router.row_H, whole(router.bias).item())
    return Row(router.weight[1])


def rows_from_mean(own: Samples, public: Sequence[Tensor]) -> list[Row]:
    """The mean hidden state of the owner's text, as long as the public row (1 where that is zero)."""
    return [_scaled(inputs_NH.mean(0), public_H) for inputs_NH, public_H in zip(own.inputs_LNH, public, strict=True)]


def rows_from_embedding(path: Path, public: Sequence[Tensor]) -> list[Row]:
    """One external embedding for every layer: a NumPy file ``[H]``, or ``[N, H]`` to be averaged.

    Raises:
        TrainingRefused: the file holds something else.
    """
    try:
        values = torch.from_numpy(numpy.load(path, allow_pickle=False)).float()
    except (OSError, ValueError, TypeError) as error:
        raise TrainingRefused(f"{path} is not a NumPy file of numbers: {error}") from error
    mean_H = values.mean(0) if values.dim() == 2 else values
    if mean_H.shape != public[0].shape or not torch.isfinite(mean_H).all() or not mean_H.any():
        raise TrainingRefused(
            f"{path} has shape {list(values.shape)}; embeddings must be finite, not zero, and of size {len(public[0])}"
        )
    return [_scaled(mean_H, public_H) for public_H in public]


def rows_from_discriminant(
    own: Samples, other: Samples, public: Sequence[Tensor], *, decay: float, sharpness: float
) -> list[Row]:
    """Logistic regression of own against public text on the anchor's hidden states, in closed form (Newton).

    A row's logit less the public one is ``sharpness`` times the log-odds. Where the best intercept would be positive,
    it is fixed at zero and the row fitted again, since a bias is at most zero.
    """
    rows = []
    for own_NH, other_NH, public_H in zip(own.inputs_LNH, other.inputs_LNH, public, strict=True):
        for constant in (1.0, 0.0):
            mine, theirs = (F.pad(x, (1, 0), value=constant) for x in (own_NH, other_NH))
            fitted = fit_row(mine, own.weights_N, theirs, other.weights_N, decay=decay)
            if fitted[0] <= 0:
                break
        rows.append(Row(public_H + sharpness * fitted[1:], sharpness * min(fitted[0].item(), 0.0)))
    return rows


def _scaled(mean_H: Tensor, public_H: Tensor) -> Row:
    length = public_H.norm().item() or 1.0
    return Row(mean_H / mean_H.norm().clamp(min=1e-12) * length)
