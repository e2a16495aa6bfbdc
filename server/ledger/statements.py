"""What an owner's experts did in a period, and what is owed for it, summed by the database: rows never come here.

A request belongs to the period in which it ended, in UTC.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, Literal, Self

from flexgate.policies.agreements import Agreement, Compensate, Duty
from flexgate.server.ledger.amounts import NO_USES, Uses, owed, rounded
from flexgate.server.ledger.corrections import OF_PERIOD, Correction
from flexgate.server.ledger.costs import MOST_ROWS, MOST_SECONDS, UNDER, uses
from flexgate.server.ledger.entries import MICROSECONDS
from flexgate.server.ledger.errors import TooMuchAsked
from flexgate.server.ledger.terms import Terms, Version
from flexgate.server.ledger.usage import Reading

DAY: Final = 86_400
PeriodKind = Literal["day", "month"]
_NAME: Final = re.compile(r"(?P<year>\d{4})-(?P<month>\d\d)(-(?P<day>\d\d))?", re.ASCII)
EVERY: Final = 2**62
"""A number that no request in the ledger has."""
MOST_RECEIPTS: Final = 4_000_000
"""Of one statement: their hashes take 256 MB while its tree is made."""
LEAST_SECONDS: Final = 60
"""What is not parted to be summed."""
_OWNERS: Final = "ended_at >= ? AND ended_at < ? AND owner = ? AND +usage.sequence <= ?"
_USES: Final = uses(_OWNERS, (*UNDER, "expert", "tenant"), "max(ended_at)")
_DAYS: Final = uses(_OWNERS, (f"ended_at / {DAY * MICROSECONDS} * {DAY}",), "count(DISTINCT usage.sequence)")
_FIRST: Final = "SELECT sequence FROM usage WHERE ended_at >= ? ORDER BY ended_at, sequence LIMIT 1"
_LAST: Final = "SELECT sequence FROM usage WHERE ended_at < ? ORDER BY ended_at DESC, sequence DESC LIMIT 1"
_SEQUENCES: Final = (
    "SELECT usage.sequence FROM usage JOIN parts USING (sequence) WHERE usage.sequence BETWEEN ? AND ? "
    "AND +ended_at >= ? AND +ended_at < ? AND owner = ? ORDER BY usage.sequence"
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
        duties: the rates of that version.
        amount: exact, with its currency; None where the agreement lets nothing be paid.
        last_used_at: microseconds of Unix time at which the last request ended.
    """

    agreement: tuple[str, int] | None
    expert: str
    uses: Uses
    duties: tuple[Compensate, ...]
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
    """The uses of an owner's experts in a period, each counted in one line, under one tenant and in one day.

    `corrections` are those that were made in the period, of receipts of any.
    """

    lines: tuple[Line, ...]
    tenants: Mapping[str, Uses]
    days: tuple[Day, ...]
    corrections: tuple[Correction, ...]

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
        """The sum of all amounts, by currency, rounded once in its smallest unit."""
        amounts = [line.amount for line in self.lines if line.amount]
        amounts += [(Fraction(one.amount), one.currency) for one in self.corrections if one.amount and one.currency]
        totals: dict[str, Fraction] = {}
        for value, currency in sorted(amounts, key=lambda one: one[1]):
            totals[currency] = totals.get(currency, Fraction()) + value
        return {currency: rounded(value, currency) for currency, value in totals.items()}


@dataclass(frozen=True, slots=True)
class OwnerUses:
    """The sums that an account is made of; `counted_under` are the versions of agreements that it needs."""

    rows: Sequence[tuple[Any, ...]]
    days: tuple[Day, ...]
    corrections: tuple[Correction, ...]

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
                _line(name, expert, uses, () if name is None else terms[name].duties, last)
                for (name, expert), (uses, last) in by_line.items()
            ),
            by_tenant,
            self.days,
            self.corrections,
        )


def _line(name: Version | None, expert: str, uses: Uses, duties: tuple[Duty, ...], last: int) -> Line:
    paid = tuple(duty for duty in duties if isinstance(duty, Compensate))
    return Line(name, expert, uses, paid, owed(duties, uses), last)


def first_end(path: Path) -> int | None:
    """When the first request ended that the ledger has, in Unix seconds. Blocks; raises `LedgerError`."""
    with reading_statements(path) as reading:
        ((at,),) = reading.rows("SELECT min(ended_at) FROM usage", ())
    return None if at is None else int(at) // MICROSECONDS


def reading_statements(path: Path) -> Reading:
    """One moment of a ledger, for the sums of statements."""
    return Reading(path, seconds=MOST_SECONDS, most=MOST_ROWS)


def owner_uses(path: Path, owner: str, period: Period) -> OwnerUses:
    """The sums of an owner's uses in a period, all of one moment. Blocks.

    Raises:
        LedgerError: the file cannot be read.
        TooMuchAsked: there is too much to sum.
    """
    with reading_statements(path) as reading:
        return uses_read(reading, owner, period)


def owner_uses_in_parts(path: Path, owner: str, period: Period, goes_on: Callable[[], bool]) -> OwnerUses:
    """As `owner_uses`, of a period that is over: what is too much to sum at once is summed by days, or halves of them.

    Args:
        goes_on: asked before each part; once it is not true, `TooMuchAsked` is raised.
    """
    if not goes_on():
        raise TooMuchAsked("the sums took too long, or the server is stopping")
    try:
        return owner_uses(path, owner, period)
    except TooMuchAsked:
        if period.end - period.start <= LEAST_SECONDS:
            raise
    step = min(DAY, (period.end - period.start) // 2)
    parts = [
        owner_uses_in_parts(path, owner, replace(period, start=start, end=min(start + step, period.end)), goes_on)
        for start in range(period.start, period.end, step)
    ]
    return OwnerUses(
        [row for part in parts for row in part.rows],
        tuple(day for part in parts for day in part.days),
        tuple(correction for part in parts for correction in part.corrections),
    )


def uses_read(reading: Reading, owner: str, period: Period, *, until: int = EVERY) -> OwnerUses:
    """The sums of an owner's uses in a period, in requests up to a number in the ledger."""
    values = (*_times(period), owner, until)
    rows, days = reading.rows(_USES, values), reading.rows(_DAYS, values)
    in_days = (Day(start, requests, Uses(*counts)) for start, *counts, requests in days)
    return OwnerUses(rows, tuple(in_days), corrections_read(reading, owner, period))


def sequences_read(
    reading: Reading, owner: str, period: Period, *, after: int = 0, until: int = EVERY
) -> Iterator[int]:
    """The numbers in the ledger of a period's requests in which an owner's experts took part, in their order."""
    times = _times(period)
    first = reading.rows(_FIRST, times[:1])  # requests are in the order of their ends
    if not first:
        return
    values = (max(first[0][0], after + 1), min(newest_read(reading, period), until), *times, owner)
    found = reading.stream(_SEQUENCES, values)
    for number, (sequence, _) in enumerate(groupby(found, itemgetter(0))):
        if number == MOST_RECEIPTS:
            raise TooMuchAsked(f"there are more than {MOST_RECEIPTS:,} receipts")
        yield sequence


def newest_read(reading: Reading, period: Period) -> int:
    """The number in the ledger of the last request of a period, or before it; 0 for none."""
    found = reading.rows(_LAST, _times(period)[1:])
    return found[0][0] if found else 0


def corrections_read(reading: Reading, owner: str, period: Period) -> tuple[Correction, ...]:
    """The corrections of what an owner is owed that were made in a period."""
    return tuple(Correction(*row) for row in reading.rows(OF_PERIOD, (*_times(period), owner)))


def _times(period: Period) -> tuple[int, int]:
    return period.start * MICROSECONDS, period.end * MICROSECONDS
