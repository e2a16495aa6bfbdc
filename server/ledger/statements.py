"""What an owner's experts did in a period, and what is owed for it, summed by the database: rows never come here.

A request belongs to the period in which it ended, in UTC.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Literal, Self

from flexgate.policies.agreements import Agreement
from flexgate.server.ledger.amounts import NO_USES, Uses, owed, rounded
from flexgate.server.ledger.costs import MOST_ROWS, MOST_SECONDS, USES
from flexgate.server.ledger.entries import MICROSECONDS
from flexgate.server.ledger.terms import Terms
from flexgate.server.ledger.usage import Reading

DAY: Final = 86_400
PeriodKind = Literal["day", "month"]
_NAME: Final = re.compile(r"(?P<year>\d{4})-(?P<month>\d\d)(-(?P<day>\d\d))?", re.ASCII)
_OF_OWNER: Final = "FROM usage JOIN parts USING (sequence) WHERE ended_at >= ? AND ended_at < ? AND owner = ?"
_USES: Final = (
    f"SELECT agreement, agreement_version, duties_sha256, expert, tenant, {USES}, max(ended_at) {_OF_OWNER} "
    "GROUP BY agreement, agreement_version, duties_sha256, expert, tenant "
    "ORDER BY agreement, agreement_version, duties_sha256, expert, tenant"
)
_DAYS: Final = (
    f"SELECT ended_at / {DAY * MICROSECONDS} * {DAY} AS day, count(DISTINCT usage.sequence), {USES} {_OF_OWNER} "
    "GROUP BY day ORDER BY day"
)


@dataclass(frozen=True, slots=True)
class Period:
    """A day or a month in UTC, named as `2026-11-30` or `2026-11`; Unix seconds, the end not inside."""

    name: str
    kind: PeriodKind
    start: int
    end: int

    @classmethod
    def at(cls, kind: PeriodKind, seconds: float) -> Self:
        """The day or month of a moment, in Unix seconds."""
        found = cls.of(datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d" if kind == "day" else "%Y-%m"))
        assert found is not None
        return found

    @classmethod
    def of(cls, name: str) -> Self | None:
        """The period of a name; None where there is none."""
        parts = _NAME.fullmatch(name)
        if parts is None:
            return None
        try:
            first = datetime(int(parts["year"]), int(parts["month"]), int(parts["day"] or 1), tzinfo=UTC)
            by_day = parts["day"] is not None
            after = first + timedelta(days=1) if by_day else (first + timedelta(days=31)).replace(day=1)
        except (ValueError, OverflowError):
            return None
        return cls(name, "day" if by_day else "month", int(first.timestamp()), int(after.timestamp()))


@dataclass(frozen=True, slots=True)
class Line:
    """What one expert did under one version of an agreement, and what is owed for it.

    Attributes:
        agreement: with its version; None of uses that no agreement is recorded of.
        amount: exact, with its currency; None where the agreement lets nothing be paid.
        last_used_at: microseconds of Unix time at which the last request ended.
    """

    agreement: tuple[str, int] | None
    expert: str
    uses: Uses
    amount: tuple[Fraction, str] | None
    last_used_at: int


@dataclass(frozen=True, slots=True)
class Day:
    """One day; `requests` counts each request once, however many experts of the owner took part."""

    start: int
    requests: int
    uses: Uses


@dataclass(frozen=True, slots=True)
class Account:
    """The uses of an owner's experts in a period, each counted in one line, under one tenant and in one day."""

    lines: tuple[Line, ...]
    tenants: Mapping[str, Uses]
    days: tuple[Day, ...]

    @property
    def requests(self) -> int:
        """Requests in which any of the owner's experts took part."""
        return sum(day.requests for day in self.days)

    @property
    def uses(self) -> Uses:
        """All uses."""
        return sum((line.uses for line in self.lines), NO_USES)

    @property
    def totals(self) -> dict[str, Fraction]:
        """The sum of all lines' amounts, by currency, rounded once in its smallest unit."""
        totals: dict[str, Fraction] = {}
        for value, currency in sorted((line.amount for line in self.lines if line.amount), key=lambda one: one[1]):
            totals[currency] = totals.get(currency, Fraction()) + value
        return {currency: rounded(value, currency) for currency, value in totals.items()}


@dataclass(frozen=True, slots=True)
class OwnerUses:
    """The sums that an account is made of; `counted_under` are the versions of agreements that it needs."""

    rows: Sequence[tuple[Any, ...]]
    days: tuple[Day, ...]

    @property
    def counted_under(self) -> set[Terms]:
        """Agreements with their versions."""
        return {Terms((row[0], row[1]), row[2]) for row in self.rows if row[0] is not None}

    def account(self, terms: Mapping[tuple[str, int], Agreement]) -> Account:
        """What is owed by `terms`, which have all of `counted_under`."""
        by_line: dict[tuple[tuple[str, int] | None, str], tuple[Uses, int]] = {}
        by_tenant: dict[str, Uses] = {}
        for agreement, version, _, expert, tenant, *counts, last in self.rows:
            uses, name = Uses(*counts), None if agreement is None else (agreement, version)
            before, earlier = by_line.get((name, expert), (NO_USES, 0))
            by_line[name, expert] = before + uses, max(earlier, last)
            by_tenant[tenant] = by_tenant.get(tenant, NO_USES) + uses
        return Account(
            tuple(
                Line(name, expert, uses, None if name is None else owed(terms[name].duties, uses), last)
                for (name, expert), (uses, last) in by_line.items()
            ),
            by_tenant,
            self.days,
        )


def owner_uses(path: Path, owner: str, period: Period) -> OwnerUses:
    """The sums of an owner's uses in a period, all of one moment. Blocks.

    Raises:
        LedgerError: the file cannot be read.
        TooMuchAsked: there is too much to sum.
    """
    values = (period.start * MICROSECONDS, period.end * MICROSECONDS, owner)
    with Reading(path, seconds=MOST_SECONDS, most=MOST_ROWS) as reading:
        rows, days = reading.rows(_USES, values), reading.rows(_DAYS, values)
    return OwnerUses(rows, tuple(Day(start, requests, Uses(*counts)) for start, requests, *counts in days))
