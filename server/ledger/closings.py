"""Months that were closed: what is due to an owner, and what is carried over because it is less than a minimum.

A month is closed once, after the one before it, and its row is never changed: what is carried over outlasts the usage
that it came from.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Final, NamedTuple

import msgspec

from flexgate.server.ledger.amounts import exact, written
from flexgate.server.ledger.corrections import Corrections
from flexgate.server.ledger.entries import MICROSECONDS, microseconds
from flexgate.server.ledger.statements import Period

_COLUMNS: Final = "owner, period, at, actor, payouts"
_NEWEST: Final = f"SELECT {_COLUMNS} FROM closings WHERE owner = ? AND until <= ? ORDER BY until DESC LIMIT 1"


class ClosingRefused(Exception):
    """A month cannot be closed; the message says why, and what would be right."""


class Payout(NamedTuple):
    """One currency of a month: decimal numbers, `minimum` exact and the others rounded.

    Attributes:
        carried: what earlier months carried over.
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
    """A month that was closed; `at` is microseconds of Unix time."""

    owner: str
    period: str
    at: int
    actor: str
    payouts: tuple[Payout, ...]


def payouts_of(
    totals: Mapping[str, Fraction], before: Iterable[Payout], minimums: Mapping[str, Fraction]
) -> tuple[Payout, ...]:
    """What is due of each currency that something was owed or carried over in."""
    carried = {one.currency: Fraction(one.carried_on) for one in before if Fraction(one.carried_on)}
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

    def close(
        self,
        owner: str,
        period: Period,
        totals: Mapping[str, Fraction],
        minimums: Mapping[str, Fraction],
        *,
        at: float,
        actor: str,
        audit: Callable[[Closing], None],
    ) -> Closing:
        """Close a month that is over; the same again is the closing that there is.

        Args:
            totals: those of its final statement, by currency.
            minimums: the least that is paid, by currency; of others, anything is.
            at: Unix seconds.
            audit: records it before it is added; what it raises prevents that.

        Raises:
            ClosingRefused: it was closed otherwise, or it is not the month after the last one that was closed.
        """
        with self._corrections.lock:
            self._corrections.require_room()
            with self._corrections.opened() as connection:
                known = _find(connection, owner, period)
                newest = _newest(connection, owner)
                before = _newest(connection, owner, period.start) if known else newest
            payouts = payouts_of(totals, before.payouts if before else (), minimums)
            if known is not None:
                if known.payouts != payouts:
                    raise ClosingRefused(
                        f"the month {period.name} was closed with other amounts: a closing is never changed"
                    )
                return known
            _require_next(period, newest)
            row = Closing(owner, period.name, microseconds(at), actor, payouts)
            audit(row)
            with self._corrections.opened() as connection:
                connection.execute(
                    f"INSERT INTO closings ({_COLUMNS}, until) VALUES (?, ?, ?, ?, ?, ?)",
                    (*row[:4], msgspec.json.encode(payouts).decode(), period.end * MICROSECONDS),
                )
            return row


def _require_next(period: Period, newest: Closing | None) -> None:
    last = None if newest is None else Period.of(newest.period)
    if last is not None and period.start != last.end:
        following = Period.at("month", last.end)
        raise ClosingRefused(f"{last.name} is the last month that was closed: close {following.name} next")


def _find(connection: sqlite3.Connection, owner: str, period: Period) -> Closing | None:
    newest = _newest(connection, owner, period.end)
    return newest if newest is not None and newest.period == period.name else None


def _newest(connection: sqlite3.Connection, owner: str, until: int = 2**40) -> Closing | None:
    """The last month that was closed, of those that ended by a time in Unix seconds."""
    row = connection.execute(_NEWEST, (owner, until * MICROSECONDS)).fetchone()
    if row is None:
        return None
    _, period, at, actor, payouts = row
    return Closing(owner, period, at, actor, msgspec.json.decode(payouts, type=tuple[Payout, ...]))
