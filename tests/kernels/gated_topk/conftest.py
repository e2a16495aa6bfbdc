"""Every implementation of gated_topk behind one signature, and inputs to feed it.

Shape suffixes: T tokens, E experts of the layer, U units, K chosen experts.
"""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from flexgate.kernels.gated_topk import MAX_UNITS, gated_topk_implementation, gated_topk_reference, unit_map
from flexgate.kernels.gated_topk.contract import Fill, check_arguments, encode_fill
from flexgate.kernels.gated_topk.kernel import gated_topk_kernel, launch_gated_topk
from flexgate.kernels.gated_topk.vectorised import gated_topk_vectorised
from flexgate.kernels.testing.interpreter import Interpreted

SENTINEL = -7_777_777


@dataclass(frozen=True)
class Routed:
    """What one call returned and accumulated; the buffers without their sentinel rows."""

    weights_TK: Tensor
    ids_TK: Tensor
    mass_TU: Tensor
    chosen_T: Tensor

    def same_bits(self, other: "Routed") -> bool:
        return all(_same_bits(getattr(self, field.name), getattr(other, field.name)) for field in fields(self))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    # NaN never equals NaN, and −0.0 equals 0.0: compare what is stored.
    view = torch.int32 if one.dtype is torch.float32 else one.dtype
    both_nan = one.isnan() & other.isnan()
    return one.dtype is other.dtype and bool(((one.view(view) == other.view(view)) | both_nan).all())


class Router:
    """One implementation; every call gets fresh attribution buffers with sentinels behind the last token."""

    def __init__(self, function: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self._function = function

    def layers(self, layers: list[Tensor], gate_T: Tensor, *, top_k: int, maps: list[Tensor] | None = None) -> Routed:
        """Several layers one after another into one pair of buffers; the last layer's weights and ids."""
        tokens, experts = layers[0].shape
        units = experts if maps is None else MAX_UNITS
        mass_TU, chosen_T = torch.zeros(tokens, units, dtype=torch.int64), torch.zeros(tokens, dtype=torch.int64)
        outputs = [
            self._function(
                logits_TE,
                gate_T,
                unit_E=unit_E,
                bias_E=None,
                mass_TU=mass_TU,
                chosen_T=chosen_T,
                top_k=top_k,
                renormalize=False,
                fill="first",
            )
            for logits_TE, unit_E in zip(layers, maps or [unit_map(range(experts))] * len(layers), strict=True)
        ]
        return Routed(*outputs[-1], mass_TU, chosen_T)

    def __call__(
        self,
        logits_TE: Tensor,
        gate_T: Tensor,
        *,
        unit_E: Tensor | None = None,
        units: int | None = None,
        top_k: int = 2,
        renormalize: bool = False,
        bias_E: Tensor | None = None,
        fill: Fill = "first",
    ) -> Routed:
        """Without a map each expert is a unit of its own; without a number of units as many as needed, or all."""
        tokens, experts = logits_TE.shape
        if unit_E is None:
            unit_E, units = unit_map(range(experts)), units or experts
        mass_TU = torch.full((tokens + 3, units or MAX_UNITS), SENTINEL)
        chosen_T = torch.full((tokens + 3,), SENTINEL)
        mass_TU[:tokens], chosen_T[:tokens] = 0, 0
        weights_TK, ids_TK = self._function(
            logits_TE,
            gate_T,
            unit_E=unit_E,
            bias_E=bias_E,
            mass_TU=mass_TU,
            chosen_T=chosen_T,
            top_k=top_k,
            renormalize=renormalize,
            fill=fill,
        )
        assert bool((mass_TU[tokens:] == SENTINEL).all() and (chosen_T[tokens:] == SENTINEL).all())
        return Routed(weights_TK, ids_TK, mass_TU[:tokens], chosen_T[:tokens])


_CHECKED = ("unit_E", "bias_E", "mass_TU", "chosen_T", "top_k")


def _checked(implementation: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def call(logits_TE: Tensor, gate_T: Tensor, **named: Any) -> tuple[Tensor, Tensor]:
        fill = encode_fill(named.pop("fill"), logits_TE.shape[1])
        check_arguments(logits_TE, gate_T, **{name: named[name] for name in _CHECKED})
        return implementation(router_logits_TE=logits_TE, gate_T=gate_T, fill=fill, **named)

    return call


def _interpreted(**named: Any) -> tuple[Tensor, Tensor]:
    return launch_gated_topk(Interpreted(gated_topk_kernel), **named)


def _native(*operands: Any, **named: Any) -> tuple[Tensor, Tensor]:
    if gated_topk_implementation(torch.device("cpu")) != "C":
        pytest.fail("routing in C is not in use: there is no C compiler, or it failed its trial against NumPy")
    weights_TK, ids_TK = torch.ops.flexgate.gated_topk.default(*operands, **named)
    return weights_TK, ids_TK


IMPLEMENTATIONS = {"native": _native, "numpy": gated_topk_vectorised, "kernel": _interpreted}


_M_PERTURB = -6  # mallopt(3): allocated bytes are set to the complement of the value, freed ones to the value


@pytest.fixture(autouse=True)
def _poison_new_allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An output element that is not written must show: 3e38 in memory that the C library hands out, NaN in torch's."""
    empty_like, new_empty = torch.empty_like, Tensor.new_empty

    def poisoned(tensor: Tensor) -> Tensor:
        if tensor.dtype is torch.uint8:
            return tensor.fill_(MAX_UNITS)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else SENTINEL)

    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poisoned(empty_like(*args, **kwargs)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: poisoned(new_empty(*args, **kwargs)))
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_PERTURB, 0x80)
    yield
    libc.mallopt(_M_PERTURB, 0)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def route(implementation: str) -> Router:
    return Router(_checked(IMPLEMENTATIONS[implementation]))


@pytest.fixture(scope="session")
def routers() -> dict[str, Router]:
    """All of them by name, for property tests, which take no function-scoped fixture."""
    return {name: Router(_checked(function)) for name, function in IMPLEMENTATIONS.items()}


@pytest.fixture
def specified() -> Router:
    """The reference."""
    return Router(gated_topk_reference)


@pytest.fixture
def random_gate() -> Callable[[int, int], Tensor]:
    """gate_T over T tokens and E slots: sizes from one allowed slot to all of them, never none."""

    def draw(tokens: int, slots: int) -> Tensor:
        allowed_TE = torch.rand(tokens, slots) < torch.rand(tokens, 1)
        allowed_TE[torch.arange(tokens), torch.randint(slots, (tokens,))] = True
        return (allowed_TE.long() << torch.arange(slots)).sum(dim=1)

    return draw
