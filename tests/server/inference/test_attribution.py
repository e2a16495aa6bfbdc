"""Shares in parts per million."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgate.server.inference.attribution import PPM, share_ppm

MASSES = st.lists(st.floats(0, 1e12), max_size=64)


@given(MASSES)
def test_shares_sum_to_exactly_one_million_or_nothing_was_used(masses: list[float]) -> None:
    assert sum(share_ppm(masses)) == (PPM if any(masses) else 0)


@given(MASSES)
def test_each_share_is_within_one_of_its_exact_value(masses: list[float]) -> None:
    total = math.fsum(masses)
    for mass, share in zip(masses, share_ppm(masses), strict=True):
        if total:
            assert abs(share - mass / total * PPM) < 1.001


@given(MASSES)
def test_no_mass_means_no_share(masses: list[float]) -> None:
    for mass, share in zip(masses, share_ppm(masses), strict=True):
        assert mass > 0 or share == 0


@pytest.mark.parametrize(
    ("masses", "shares"),
    [
        ([], []),
        ([0.0, 0.0], [0, 0]),
        ([1.0], [PPM]),
        ([1.0, 1.0, 1.0], [333_334, 333_333, 333_333]),
        ([0.0, 2.0, 2.0], [0, 500_000, 500_000]),
        ([5e-324, 1e300], [0, PPM]),
        (
            [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0],
            [166_667, 166_667, 0, 166_667, 166_667, 166_666, 166_666],
        ),
    ],
)
def test_examples(masses: list[float], shares: list[int]) -> None:
    assert share_ppm(masses) == shares


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_what_is_no_mass_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        share_ppm([1.0, bad])
