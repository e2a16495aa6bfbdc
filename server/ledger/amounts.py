"""What uses are worth under an agreement's duties: exact amounts, which are rounded once, by who shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from flexgate.policies.agreements import Compensate, Duty, Unit
from flexgate.policies.vocabulary import minor_digits
from flexgate.server.ledger.shares import PPM

DIGITS: Final = 21
"""After the point of any exact amount: 9 of a rate, 6 of a share, and 6 of a unit of a million tokens."""


@dataclass(frozen=True, slots=True)
class Uses:
    """What experts did in requests, summed.

    Attributes:
        requests: those in which an expert took part, each once for every expert that did.
        tokens: positions in which one did.
        share_weighted_ppm: tokens of each request times an expert's share in ppm: millionths of a token.
    """

    requests: int
    tokens: int
    share_weighted_ppm: int

    def __add__(self, other: Uses) -> Uses:
        return Uses(
            self.requests + other.requests,
            self.tokens + other.tokens,
            self.share_weighted_ppm + other.share_weighted_ppm,
        )


NO_USES: Final = Uses(0, 0, 0)
_THOUSAND, _MILLION = 1_000, 1_000_000
_PER: Final[Mapping[Unit, int]] = {
    "request": 1,
    "thousand_tokens": _THOUSAND,
    "thousand_share_weighted_tokens": _THOUSAND * PPM,
    "million_tokens": _MILLION,
    "million_share_weighted_tokens": _MILLION * PPM,
}


def quantity(unit: Unit, uses: Uses) -> Fraction:
    """How many units uses are."""
    if unit == "request":
        return Fraction(uses.requests)
    counted = uses.share_weighted_ppm if "share_weighted" in unit else uses.tokens
    return Fraction(counted, _PER[unit])


def amount(duty: Compensate, uses: Uses) -> Fraction:
    """What one duty makes of uses, exactly."""
    return Fraction(duty.rate) * quantity(duty.unit, uses)


def owed(duties: tuple[Duty, ...], uses: Uses) -> tuple[Fraction, str] | None:
    """What all duties of an agreement make of uses, exactly, and its currency; None where nothing is to be paid."""
    paid = [duty for duty in duties if isinstance(duty, Compensate)]
    return (sum((amount(duty, uses) for duty in paid), Fraction()), paid[0].currency) if paid else None


def exact(value: Fraction) -> str:
    """An exact amount or quantity as a decimal number."""
    return _decimal(value, DIGITS).rstrip("0").rstrip(".")


def rounded(value: Fraction, currency: str) -> Fraction:
    """An amount in whole smallest units of its currency; half of one goes to the even neighbour."""
    scale = 10 ** minor_digits(currency)
    return Fraction(round(value * scale), scale)


def written(value: Fraction, currency: str) -> str:
    """A rounded amount with all digits of its currency, such as 12.30 of EUR."""
    return _decimal(value, minor_digits(currency))


def _decimal(value: Fraction, digits: int) -> str:
    scaled = round(value * 10**digits)
    whole, rest = divmod(abs(scaled), 10**digits)
    return f"{'-' * (scaled < 0)}{whole}" + (f".{rest:0{digits}d}" if digits else "")
