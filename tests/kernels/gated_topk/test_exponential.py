"""The exponential that every implementation computes: correctly rounded, and the same at every place."""

from typing import Any

import torch

from flexgate.kernels.gated_topk.reference import exponential_reference


def arguments() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.cat([-torch.rand(200_000) * 104, -torch.rand(200_000), -torch.logspace(-30, 2.01, 20_000)])


def test_it_is_the_correctly_rounded_one() -> None:
    values = arguments()
    wrong = exponential_reference(values) != values.double().exp().float()
    assert int(wrong.sum()) <= 1


def test_its_ends() -> None:
    ends = torch.tensor([0.0, -0.0, -103.97, -104.0, -1e30, float("-inf"), float("nan")])
    assert exponential_reference(ends)[:6].tolist() == [1.0, 1.0, 2.0**-149, 0.0, 0.0, 0.0]
    assert bool(exponential_reference(ends)[6].isnan())


def test_it_is_the_same_at_every_place_of_a_vector(route: Any) -> None:
    """A vector's body and its tail must round alike, since removing an expert moves the others."""
    shifted_E = -torch.rand(37) * 12
    shifted_E[0] = 0
    expected = route(shifted_E[None], torch.tensor([-1]), top_k=37).weights_TK
    for turn in (1, 3, 8, 20, 36):
        moved = route(shifted_E.roll(turn)[None], torch.tensor([-1]), top_k=37)
        assert torch.equal(moved.weights_TK, expected)
