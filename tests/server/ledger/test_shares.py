"""Shares in parts per million."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgate.server.ledger.shares import PPM, share_ppm

MASSES = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 2**62)), max_size=64)


@given(MASSES)
def test_shares_sum_to_exactly_one_million_or_nothing_was_used(masses: list[int]) -> None:
    assert sum(share_ppm(masses)) == (PPM if any(masses) else 0)


@given(MASSES)
def test_each_share_is_within_one_of_its_exact_value(masses: list[int]) -> None:
    for mass, share in zip(masses, share_ppm(masses), strict=True):
        assert not any(masses) or abs(share - Fraction(mass * PPM, sum(masses))) < 1


@given(MASSES)
def test_no_mass_means_no_share(masses: list[int]) -> None:
    for mass, share in zip(masses, share_ppm(masses), strict=True):
        assert mass > 0 or share == 0


@given(MASSES, st.integers(0, 64))
def test_an_expert_without_mass_changes_no_other_share(masses: list[int], place: int) -> None:
    """A response lists experts that the ledger does not: those outside the gate."""
    with_it = share_ppm([*masses[:place], 0, *masses[place:]])
    assert [*with_it[: len(masses[:place])], *with_it[len(masses[:place]) + 1 :]] == share_ppm(masses)


@pytest.mark.parametrize(
    ("masses", "shares"),
    [
        ([], []),
        ([0, 0], [0, 0]),
        ([1], [PPM]),
        ([1, 1, 1], [333_334, 333_333, 333_333]),
        ([0, 2, 2], [0, 500_000, 500_000]),
        ([1, 10**300], [0, PPM]),
        ([1, 1, 0, 1, 1, 1, 1], [166_667, 166_667, 0, 166_667, 166_667, 166_666, 166_666]),
    ],
)
def test_examples(masses: list[int], shares: list[int]) -> None:
    assert share_ppm(masses) == shares


def test_what_is_no_mass_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        share_ppm([1, -1])
