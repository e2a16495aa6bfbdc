"""Amounts are exact, and rounded once."""

from __future__ import annotations

from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgate.policies.agreements import Attribute, Compensate, Unit
from flexgate.server.ledger.amounts import NO_USES, Uses, amount, exact, owed, quantity, rounded, written

RATES = st.decimals(0, 999_999_999, places=9)
COUNTS = st.integers(0, 2**62)
UNITS: tuple[Unit, ...] = (
    "request",
    "thousand_tokens",
    "thousand_share_weighted_tokens",
    "million_tokens",
    "million_share_weighted_tokens",
)


def paid(rate: object, unit: Unit = "request", currency: str = "EUR") -> Compensate:
    return Compensate.model_validate({"kind": "compensate", "rate": rate, "currency": currency, "unit": unit})


@given(RATES, COUNTS, st.sampled_from(UNITS))
def test_an_amount_is_that_of_decimal_arithmetic_without_any_rounding(rate: Decimal, count: int, unit: Unit) -> None:
    per = {"request": 0, "thousand": 3, "million": 6}[unit.partition("_")[0]] + 6 * ("share_weighted" in unit)
    with localcontext(prec=100):
        wanted = rate * Decimal(count) / Decimal(10**per)
    value = amount(paid(rate, unit), Uses(count, count, count))
    assert Decimal(exact(value)) == wanted
    assert Fraction(exact(value)) == value


@given(RATES, st.sampled_from(UNITS), st.lists(st.builds(Uses, *[st.integers(0, 10**9)] * 3), max_size=9))
def test_the_sum_of_amounts_is_the_amount_of_the_sum(rate: Decimal, unit: Unit, uses: list[Uses]) -> None:
    duty = paid(rate, unit)
    assert sum((amount(duty, one) for one in uses), Fraction()) == amount(duty, sum(uses, NO_USES))


@pytest.mark.parametrize(
    ("unit", "said"),
    zip(UNITS, ("3", "2.5", "0.0045", "0.0025", "0.0000045"), strict=True),
)
def test_a_unit_counts_what_it_says(unit: Unit, said: str) -> None:
    assert exact(quantity(unit, Uses(3, 2_500, 4_500_000))) == said


@pytest.mark.parametrize(
    ("value", "currency", "said"),
    [
        ("0.005", "EUR", "0.00"),
        ("0.015", "EUR", "0.02"),
        ("0.0050000000000000000001", "EUR", "0.01"),
        ("1234567.895", "EUR", "1234567.90"),
        ("2.5", "JPY", "2"),
        ("3.5", "JPY", "4"),
        ("0.0125", "KWD", "0.012"),
        ("0", "USD", "0.00"),
    ],
)
def test_an_amount_is_rounded_half_to_even_in_the_smallest_unit_of_its_currency(
    value: str, currency: str, said: str
) -> None:
    assert written(rounded(Fraction(value), currency), currency) == said


def test_all_duties_of_an_agreement_are_added_up() -> None:
    duties = (Attribute(kind="attribute"), paid("0.5"), paid("2", "thousand_tokens"))
    assert owed(duties, Uses(3, 1_000, 0)) == (Fraction(7, 2), "EUR")
    assert owed(duties[:1], Uses(3, 1_000, 0)) is None
