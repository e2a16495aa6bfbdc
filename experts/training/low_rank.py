"""An owner's FFN as the frozen public one plus products of two factors, which alone train (LoRA, arXiv 2106.09685).

Shapes: N tokens, R rank, I and O input and output of a projection.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexgate.experts.package.size import PROJECTIONS
from flexgate.experts.package.weights import Factors
from flexgate.experts.training.model import ExpertFFN, FlexOlmo


class LowRankLinear(nn.Module):
    """``public(x) + B A x``; B starts at zero, so that training starts from the public projection."""

    def __init__(self, public: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self._public = (public,)  # in a tuple, where torch registers no second owner of the weight
        start_RI = torch.empty(rank, public.in_features).normal_(0.0, public.in_features**-0.5, generator=generator)
        self.lora_A = nn.Parameter(start_RI)
        self.lora_B = nn.Parameter(torch.zeros(public.out_features, rank))

    def forward(self, x_NI: Tensor) -> Tensor:
        """The projection of ``x_NI``."""
        return cast(Tensor, self._public[0](x_NI)) + F.linear(F.linear(x_NI, self.lora_A), self.lora_B)

    def factors(self, dtype: torch.dtype) -> Factors:
        """Copies as they are stored in ``dtype``."""
        return Factors(self.lora_A.detach().to(dtype, copy=True), self.lora_B.detach().to(dtype, copy=True))


class LowRankFFN(ExpertFFN):
    """An ``ExpertFFN`` whose projections are those of another one and factors."""

    def __init__(self, public: ExpertFFN, rank: int, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        for name in PROJECTIONS:
            self.add_module(name, LowRankLinear(getattr(public, name), rank, generator))

    def factors(self, dtype: torch.dtype) -> list[Factors]:
        """In the order of ``layout.EXPERT_KEYS``."""
        return [cast(LowRankLinear, getattr(self, name)).factors(dtype) for name in PROJECTIONS]


def use_factors(pair: FlexOlmo, rank: int, seed: int) -> None:
    """Replace the owner's FFN of every layer by factors beside the public one, frozen as they are."""
    generator = torch.Generator().manual_seed(seed)
    for block in pair.model.blocks:
        block.mlp.experts[1] = LowRankFFN(block.mlp.ffns[0], rank, generator).requires_grad_(False)
