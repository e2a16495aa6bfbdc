"""What a request may cost at most by the agreements that its uses count under, and what it did cost.

In whole billionths of a currency, each request rounded up, so that a sum is never less than what is owed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, NamedTuple

from flexgate.policies.agreements import Compensate
from flexgate.policies.compiled.agreements import CompiledAgreement
from flexgate.policies.decision import Decision
from flexgate.policies.documents import BILLION
from flexgate.policies.ids import ExpertId
from flexgate.server.http.errors import Forbidden
from flexgate.server.inference.limits.limiter import LimitScope
from flexgate.server.ledger.amounts import Uses, amount, owed
from flexgate.server.ledger.entries import Part

MOST_KNOWN: Final = 1_024
"""Sets of agreements whose price is kept."""
_ONE_REQUEST: Final = Uses(1, 0, 0)
_ONE_TOKEN: Final = Uses(0, 1, 0)
_ONE_WHOLE_TOKEN: Final = Uses(0, 0, 1_000_000)


@dataclass(frozen=True, slots=True)
class Price:
    """What the agreements of a request ask for, in one currency.

    Attributes:
        per_request: if every expert takes part.
        per_token: if every expert takes part in it, and the one whose share costs most has all of that.
    """

    per_request: Fraction
    per_token: Fraction

    def most(self, tokens: int, *, entries: int = 1) -> int:
        """What so many tokens cost at most, in billionths; each entry of the ledger counts as a request."""
        return _billionths(self.per_request * entries + self.per_token * tokens)

    def tokens(self, billionths: float, *, entries: int = 1) -> float:
        """The most tokens that cost no more than that, as `most` has it."""
        if self.per_token == 0 or billionths == math.inf:
            return math.inf
        return (Fraction(billionths) / BILLION - self.per_request * entries) // self.per_token


class _Asked(NamedTuple):
    """A price, and the currencies that it is in, each with the number of the first expert that is paid in it."""

    price: Price | None
    currencies: tuple[tuple[int, str], ...]


_known: Final[dict[tuple[str, ...], _Asked]] = {}


def price_of(decision: Decision, scopes: Iterable[LimitScope]) -> Price | None:
    """What budgets of money have to bear; None where the request costs nothing.

    Raises:
        Forbidden: an agreement is paid in another currency than a budget is in.
    """
    budgets = {
        (scope.kind, cost.currency)
        for scope in scopes
        for cost in (scope.quota.cost_per_day, scope.quota.cost_per_month)
        if cost is not None
    }
    asked = _asked_by(decision.agreements)
    for number, paid_in in asked.currencies:
        for kind, currency in sorted(budgets):
            if paid_in != currency:
                expert = decision.allowed[number]
                leave = f"Leave it out ('flexgate': {{'experts': {{'ignore': ['{expert}']}}}}), or ask"
                advice = "Ask" if expert in decision.required else leave
                raise Forbidden(
                    f"{kind}'s budget is in {currency}, and the expert '{expert}' is paid in {paid_in}. "
                    f"{advice} an administrator for a budget in {paid_in}.",
                    code="budget_currency",
                )
    return asked.price


def _asked_by(agreements: Sequence[CompiledAgreement | None]) -> _Asked:
    """What agreements ask for together; most requests have those of an earlier one."""
    key = tuple("" if one is None else one.duties_sha256 for one in agreements)
    found = _known.get(key)
    if found is None:
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        found = _known[key] = _add_up([_paid(one) for one in agreements])
    return found


def _add_up(duties: Sequence[Sequence[Compensate]]) -> _Asked:
    requests, tokens, shares = Fraction(), Fraction(), Fraction()
    currencies: dict[str, int] = {}
    for number, paid in enumerate(duties):
        if paid:
            currencies.setdefault(paid[0].currency, number)
        requests += sum(amount(duty, _ONE_REQUEST) for duty in paid)
        tokens += sum(amount(duty, _ONE_TOKEN) for duty in paid)
        shares = max(shares, sum((amount(duty, _ONE_WHOLE_TOKEN) for duty in paid), Fraction()))
    price = Price(requests, tokens + shares)
    return _Asked(price if price.most(1) else None, tuple((number, name) for name, number in currencies.items()))


def cost_of(decision: Decision, entries: Iterable[tuple[Sequence[Part], int]]) -> int:
    """What a request did cost, in billionths: its parts under the agreements that they count under.

    Args:
        entries: those of the ledger: the parts, and all tokens, whose shares the parts have.
    """
    agreements = dict(zip(decision.allowed, decision.agreements, strict=True))
    total = Fraction()
    for part, tokens in ((part, tokens) for parts, tokens in entries for part in parts):
        agreement = agreements.get(ExpertId(part.expert))
        uses = Uses(1, part.prompt_positions + part.completion_positions, part.share_ppm * tokens)
        found = None if agreement is None else owed(agreement.duties, uses)
        total += Fraction() if found is None else found[0]
    return _billionths(total)


def _paid(agreement: CompiledAgreement | None) -> list[Compensate]:
    duties = () if agreement is None else agreement.duties
    return [duty for duty in duties if isinstance(duty, Compensate) and duty.rate]


def _billionths(value: Fraction) -> int:
    return math.ceil(value * BILLION)
