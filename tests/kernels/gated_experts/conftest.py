"""Random gated layers, and the kernels in the interpreter.

Shape suffixes: T tokens, E expert slots, K chosen experts, H hidden, F expert intermediate, G = 2F.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexgate.kernels.gated_experts import gated_experts_reference
from flexgate.kernels.gated_experts.launch import Kernels, launch_gated_experts
from flexgate.kernels.gated_experts.tiles import ProductTile, Tiles
from flexgate.kernels.gated_topk import gated_topk, unit_map
from flexgate.kernels.testing.interpreter import interpreted_experts


@dataclass(frozen=True)
class Layer:
    """Inputs of one gated expert layer."""

    x_TH: Tensor
    w13_EGH: Tensor
    w2_EHF: Tensor
    weights_TK: Tensor
    ids_TK: Tensor

    def operands(self) -> tuple[Tensor, ...]:
        return self.x_TH, self.w13_EGH, self.w2_EHF, self.weights_TK, self.ids_TK

    def reference(self) -> Tensor:
        return gated_experts_reference(*self.operands())

    def with_slots(self, slots: list[int]) -> "Layer":
        """The same layer where only `slots` ever existed, moved together."""
        renumber = torch.full((len(self.w2_EHF) + 1,), -1, dtype=torch.int32)
        renumber[slots] = torch.arange(len(slots), dtype=torch.int32)
        return replace(
            self, w13_EGH=self.w13_EGH[slots], w2_EHF=self.w2_EHF[slots], ids_TK=renumber[self.ids_TK.long()]
        )

    def with_tokens(self, tokens: list[int]) -> "Layer":
        return replace(self, x_TH=self.x_TH[tokens], weights_TK=self.weights_TK[tokens], ids_TK=self.ids_TK[tokens])


def make_layer(
    tokens: int,
    slots: int,
    *,
    hidden: int = 64,
    intermediate: int = 96,
    top_k: int = 3,
    dtype: torch.dtype = torch.float32,
    gate_T: Tensor | None = None,
    seed: int = 0,
) -> Layer:
    """Fresh random weights and tokens, routed by gated_topk with no filler ids; gates of every size by default."""
    generator = torch.Generator().manual_seed(seed + 1000 * tokens + slots)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if gate_T is None:
        allowed_TE = torch.rand(tokens, slots, generator=generator) < torch.rand(tokens, 1, generator=generator)
        allowed_TE[torch.arange(tokens), torch.randint(slots, (tokens,), generator=generator)] = True
        gate_T = (allowed_TE.long() << torch.arange(slots)).sum(dim=1)
    weights_TK, ids_TK = gated_topk(
        normal(tokens, slots),
        gate_T,
        unit_E=unit_map(range(slots)),
        top_k=top_k,
        renormalize=False,
        bias_E=None,
        mass_TU=torch.zeros(tokens, slots, dtype=torch.int64),
        chosen_T=torch.zeros(tokens, dtype=torch.int64),
        fill="none",
    )
    return Layer(
        normal(tokens, hidden).to(dtype),
        (normal(slots, 2 * intermediate, hidden) / hidden**0.5).to(dtype),
        (normal(slots, hidden, intermediate) / intermediate**0.5).to(dtype),
        weights_TK,
        ids_TK,
    )


SMALL = Tiles(None, 16, ProductTile(64, 32, 1, 4, 1), ProductTile(64, 32, 1, 4, 1))


@pytest.fixture(scope="session")
def layer() -> Callable[..., Layer]:
    return make_layer


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    return interpreted_experts()


@pytest.fixture(scope="session")
def small_tiles() -> Tiles:
    return SMALL


@pytest.fixture(autouse=True)
def _poison_new_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workspace that is read before it is written, and output that is not written, must show."""
    new_empty = Tensor.new_empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = new_empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -7_777_777)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


@pytest.fixture(scope="session")
def run() -> Callable[..., Tensor]:
    """The layer's output from the interpreted kernels, with sentinel rows around it that must survive."""

    def launch(layer: Layer, *, tiles: Tiles = SMALL, **changes: Any) -> Tensor:
        tokens, hidden = layer.x_TH.shape
        framed_TH = torch.full((tokens + 2, hidden), float("nan"), dtype=layer.x_TH.dtype)
        framed_TH[[0, -1]] = 12345.0
        launch_gated_experts(replace(interpreted_experts(), **changes), tiles, *layer.operands(), framed_TH[1:-1])
        assert bool((framed_TH[[0, -1]] == 12345.0).all())
        return framed_TH[1:-1]

    return launch
