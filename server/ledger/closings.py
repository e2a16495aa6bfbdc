"""Months that were closed: what is due to an owner, and what is carried over because it is less than a minimum.

A month is closed once, after the one before it, and its row is never changed: what is carried over outlasts the usage
that it came from.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Final, NamedTuple

import msgspec

from flexgate.server.ledger.amounts import exact, written
from flexgate.server.ledger.corrections import OF_PERIOD, Correction, Corrections
from flexgate.server.ledger.entries import MICROSECONDS, microseconds
from flexgate.server.ledger.statements import Period

_COLUMNS: Final = "owner, period, at, actor, payouts"
_NEWEST: Final = f"SELECT {_COLUMNS} FROM closings WHERE owner = ? AND until <= ? ORDER BY until DESC LIMIT 1"


class ClosingRefused(Exception):
    """A month cannot be closed; the message says why, and what would be right."""


class Payout(NamedTuple):
    """One currency of a month: decimal numbers, `minimum` exact and the others rounded.

    Attributes:
        carried: what earlier months carried over, with corrections that were made in months that were left out.
        total: that of the month's statement.
        due: what is to be paid: the sum of both, if it is at least `minimum`.
        carried_on: the rest, which the next month begins with; negative after more was taken off than was owed.
    """

    currency: str
    carried: str
    total: str
    minimum: str
    due: str
    carried_on: str


class Closing(NamedTuple):
    """A month that was closed; `at` is microseconds of Unix time.

    `left_out` are the months before it that were not closed, since their usage had been deleted.
    """

    owner: str
    period: str
    at: int
    actor: str
    payouts: tuple[Payout, ...]
    left_out: tuple[str, ...] = ()


class Month(NamedTuple):
    """What is to be closed.

    Attributes:
        minimums: the least that is paid, by currency; of others, anything is.
        leave_out: whether months before it may be left out whose usage was deleted before they were closed.
    """

    owner: str
    period: Period
    minimums: Mapping[str, Fraction]
    leave_out: bool = False


class Summed(NamedTuple):
    """What the ledger has of a month that is over.

    Attributes:
        totals: those of its final statement, by currency.
        since: when the first request ended that the ledger has, in Unix seconds; None if it has none.
        whole: the time before which usage was deleted, in Unix seconds.
    """

    totals: Mapping[str, Fraction]
    since: int | None
    whole: int


def payouts_of(
    totals: Mapping[str, Fraction], carried: Mapping[str, Fraction], minimums: Mapping[str, Fraction]
) -> tuple[Payout, ...]:
    """What is due of each currency that something was owed or carried over in."""
    found = []
    for currency in sorted(totals.keys() | carried.keys()):
        earlier, total, minimum = (one.get(currency, Fraction()) for one in (carried, totals, minimums))
        owed = earlier + total
        due = owed if owed > 0 and owed >= minimum else Fraction()
        found.append(
            Payout(
                currency,
                carried=written(earlier, currency),
                total=written(total, currency),
                minimum=exact(minimum),
                due=written(due, currency),
                carried_on=written(owed - due, currency),
            )
        )
    return tuple(found)


class Closings:
    """The closed months of a ledger. Methods block; raises `LedgerError` where its file cannot be read or written."""

    def __init__(self, corrections: Corrections) -> None:
        """`corrections` are in the same file: none is dated into a month that is being closed."""
        self._corrections = corrections

    def find(self, owner: str, period: Period) -> Closing | None:
        """A closed month; None of one that is not closed."""
        with self._corrections.opened() as connection:
            return _find(connection, owner, period)

    def has_any(self, owner: str) -> bool:
        """Whether a month of an owner was closed."""
        with self._corrections.opened() as connection:
            return _newest(connection, owner) is not None

    def again(self, month: Month) -> Closing | None:
        """The closing of a month that was closed in the same way; None of one that is not closed.

        Raises:
            ClosingRefused: it was closed with other minimums.
        """
        known = self.find(month.owner, month.period)
        if known is not None:
            _require_same(known, month)
        return known

    def plan(self, month: Month, summed: Summed, *, at: float, actor: str) -> Closing:
        """What `close` would add; raises what it would, and changes nothing."""
        with self._corrections.opened() as connection:
            return _planned(connection, month, summed, at=at, actor=actor)

    def close(
        self, month: Month, summed: Summed, *, at: float, actor: str, audit: Callable[[Closing], None]
    ) -> Closing:
        """Close a month that is over; the same again is the closing that there is.

        Args:
            at: Unix seconds.
            audit: records it before it is added; what it raises prevents that.

        Raises:
            ClosingRefused: it was closed otherwise, or it is not the month after the last one that was closed.
        """
        with self._corrections.lock:
            known = self.again(month)
            if known is not None:
                return known
            self._corrections.require_room()
            row = self.plan(month, summed, at=at, actor=actor)
            audit(row)
            with self._corrections.opened() as connection:
                connection.execute(
                    f"INSERT INTO closings ({_COLUMNS}, until) VALUES (?, ?, ?, ?, ?, ?)",
                    (*row[:4], msgspec.json.encode(row.payouts).decode(), month.period.end * MICROSECONDS),
                )
            return row


def _planned(connection: sqlite3.Connection, month: Month, summed: Summed, *, at: float, actor: str) -> Closing:
    newest, period = _newest(connection, month.owner), month.period
    if newest is None:
        _require_begun(period, summed)
    else:
        _require_next(newest, month, summed.whole)
    carried = _carried(connection, newest, period)
    payouts = payouts_of(summed.totals, carried, month.minimums)
    return Closing(month.owner, period.name, microseconds(at), actor, payouts, _left_out(newest, period))


def _carried(connection: sqlite3.Connection, newest: Closing | None, period: Period) -> dict[str, Fraction]:
    """What the last closing carried on, and what was corrected after its month and before this one."""
    if newest is None:
        return {}
    between = _after(newest).start * MICROSECONDS, period.start * MICROSECONDS, newest.owner
    corrected = map(Correction._make, connection.execute(OF_PERIOD, between))
    found = defaultdict[str, Fraction](Fraction)
    for one in newest.payouts:
        found[one.currency] += Fraction(one.carried_on)
    for correction in corrected:
        if correction.amount and correction.currency:
            found[correction.currency] += Fraction(correction.amount)
    return {currency: amount for currency, amount in found.items() if amount}


def _require_same(known: Closing, month: Month) -> None:
    for one in known.payouts:
        if Fraction(one.minimum) != month.minimums.get(one.currency, Fraction()):
            raise ClosingRefused(
                f"the month {known.period} was closed with the minimum {one.minimum} {one.currency}: a closing is "
                "never changed"
            )


def _require_begun(period: Period, summed: Summed) -> None:
    """Refuse to begin with a month before all usage: those after it would have to be closed one by one."""
    if not summed.totals and (summed.since is None or period.end <= summed.since):
        raise ClosingRefused(
            f"the ledger has no usage by the end of {period.name}: begin with a month that has some, or a later one"
        )


def _require_next(newest: Closing, month: Month, whole: int) -> None:
    following = _after(newest)
    if month.period.start == following.start:
        return
    if month.period.start < following.start or following.start >= whole:
        raise ClosingRefused(f"{newest.period} is the last month that was closed: close {following.name} next")
    while following.start < whole:
        following = Period.at("month", following.end)
    if not month.leave_out or month.period.start != following.start:
        raise ClosingRefused(
            f"{newest.period} is the last month that was closed, and usage of months after it was deleted "
            f"(--usage-days): close {following.name} next with 'leave_out_deleted', and add by corrections what is "
            "owed for the months that are left out"
        )


def _after(closing: Closing) -> Period:
    last = Period.of(closing.period)
    assert last is not None
    return Period.at("month", last.end)


def _left_out(before: Closing | None, period: Period) -> tuple[str, ...]:
    names = []
    if before is not None:
        one = _after(before)
        while one.start < period.start:
            names.append(one.name)
            one = Period.at("month", one.end)
    return tuple(names)


def _find(connection: sqlite3.Connection, owner: str, period: Period) -> Closing | None:
    found = _newest(connection, owner, period.end)
    if found is None or found.period != period.name:
        return None
    return found._replace(left_out=_left_out(_newest(connection, owner, period.start), period))


def _newest(connection: sqlite3.Connection, owner: str, until: int = 2**40) -> Closing | None:
    """The last month that was closed, of those that ended by a time in Unix seconds."""
    row = connection.execute(_NEWEST, (owner, until * MICROSECONDS)).fetchone()
    if row is None:
        return None
    _, period, at, actor, payouts = row
    return Closing(owner, period, at, actor, msgspec.json.decode(payouts, type=tuple[Payout, ...]))
