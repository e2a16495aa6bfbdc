"""Signed statements: what is owed to an owner for a period, bound to the owner's receipts by the root of a tree.

The tree is one of RFC 6962 over the roots of the receipts, in the order of their numbers. So an owner that holds a
receipt can show with a path that a statement counts it, and with all its receipts make root and figures again.
`docs/receipts.md` is the format. Members are written in the order of their names.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from typing import Any, Final, NamedTuple

import rfc8785

from flexgate.policies.agreements import Agreement
from flexgate.server.ledger.amounts import exact, written
from flexgate.server.ledger.corrections import Correction
from flexgate.server.ledger.entries import MICROSECONDS, microseconds
from flexgate.server.ledger.errors import TooMuchAsked
from flexgate.server.ledger.reading import opened as opened_ledger
from flexgate.server.ledger.receipts import merkle, rows
from flexgate.server.ledger.receipts.book import Book, End, opened
from flexgate.server.ledger.receipts.maker import current_key, signed
from flexgate.server.ledger.receipts.service import NoReceipt, Reader, ReceiptPending, Receipts, Signed
from flexgate.server.ledger.receipts.signing import thumbprint
from flexgate.server.ledger.receipts.trees import Tree, grow_tree
from flexgate.server.ledger.statements import (
    Account,
    Line,
    Period,
    corrections_read,
    newest_read,
    reading_statements,
    sequences_read,
    uses_read,
)
from flexgate.server.ledger.terms import Terms, Version

FORMAT: Final = "flexgate-statement/1"
PROOF: Final = "flexgate-statement-proof/1"
MOST_BYTES: Final = 16 << 20
Json = dict[str, Any]
TermsOf = Callable[[Collection[Terms]], Mapping[Version, Agreement]]


class NotInPeriod(Exception):
    """A receipt's request did not end in the period, or its receipt came later than was asked for."""


class _MadeOf(NamedTuple):
    """What a statement is made of, besides terms, which are never changed: two of the same say the same.

    Attributes:
        until: the number in the ledger of the last request that it may count.
        final: whether it counts all of the period.
    """

    owner: str
    period: Period
    until: int
    final: bool
    corrections: tuple[Correction, ...]


class Statements:
    """The signed statements of a server. Methods block.

    Raises:
        LedgerError, BookError: a file cannot be read.
        TooMuchAsked: there is too much to sum.
    """

    def __init__(self, receipts: Receipts) -> None:
        self._receipts = receipts

    def sign(self, owner: str, period: Period, terms_of: TermsOf, *, at: float, ended: bool) -> Json:
        """What receipts that are made by now say of an owner in a period; it is signed once for all that ask for it.

        Args:
            terms_of: gives agreements, or raises `LedgerError`.
            at: Unix seconds.
            ended: whether the ledger had all requests of the period before this was called.

        Raises:
            SignerUnavailable: nothing can be signed now.
        """
        receipts = self._receipts
        with opened(receipts.book) as book:
            public, end = current_key(book, receipts.maker.signer), book.end()
            with reading_statements(receipts.ledger) as reading:
                newest, corrections = newest_read(reading, period), corrections_read(reading, owner, period)
            made_of = _MadeOf(owner, period, min(newest, end.sequence), ended and newest <= end.sequence, corrections)

            def make() -> Signed:
                return self._sign(made_of, terms_of, book, end, public, at=at)

            message, signature = receipts.statements.of((made_of, public), make)
        return {"signature": signature.hex(), "statement": json.loads(message)}

    def _sign(self, of: _MadeOf, terms_of: TermsOf, book: Book, end: End, public: bytes, *, at: float) -> Signed:
        with reading_statements(self._receipts.ledger) as reading:
            found = uses_read(reading, of.owner, of.period, until=of.until)
        tree = self._tree(book, of.owner, of.period, of.until)
        account = replace(found, corrections=of.corrections).account(terms_of(found.counted_under))
        statement = {
            "at": str(microseconds(at)),
            "corrections": list(map(_correction, account.corrections)),
            "end": str(of.period.end * MICROSECONDS),
            "format": FORMAT,
            "head": {"hash": end.hash, "number": str(end.number)},
            "kid": thumbprint(public),
            "last": str(end.last),
            "lines": [_line(line) for line in account.lines],
            "owner": of.owner,
            "period": of.period.name,
            "provisional": not of.final,
            "receipts": str(len(tree.numbers)),
            "root": tree.root,
            "server": book.server,
            "start": str(of.period.start * MICROSECONDS),
            "totals": _totals(account),
        }
        message = rfc8785.dumps(statement)
        if len(message) > MOST_BYTES:
            raise TooMuchAsked(f"the statement has more than {MOST_BYTES >> 20} MiB")
        return Signed(message, signed(self._receipts.maker.signer, public, message))

    def prove(self, owner: str, period: Period, receipt: str, *, last: int | None) -> Json:
        """The path that shows that a statement counts a receipt.

        Args:
            last: the statement's, of one that is provisional; None for all receipts that are made by now.

        Raises:
            NoReceipt: there is none of this id that the owner may see.
            ReceiptPending: it is not made yet.
            NotInPeriod: no statement of the period counts it.
        """
        with opened_ledger(self._receipts.ledger) as connection:
            recorded = rows.read_one(connection, receipt)
        if recorded is None or owner not in recorded.owners:
            raise NoReceipt
        with reading_statements(self._receipts.ledger) as reading:
            newest = newest_read(reading, period)
        with opened(self._receipts.book) as book:
            until = book.end().sequence if last is None else book.sequence_of(last)
            found = book.find(recorded.sequence)
            if found is None:
                raise ReceiptPending(self._receipts.maker.waiting or "it is made within a second")
            number = found[0].first + found[1]
            tree = self._tree(book, owner, period, min(until, newest))
            index = bisect_left(tree.numbers, number)
            if index == len(tree.numbers) or tree.numbers[index] != number:
                raise NotInPeriod
            return {
                "format": PROOF,
                "index": str(index),
                "number": str(number),
                "owner": owner,
                "path": [hash_.hex() for hash_ in merkle.path(tree.levels, index)],
                "period": period.name,
                "receipt": receipt,
                "receipts": str(len(tree.numbers)),
                "root": tree.root,
                "server": book.server,
            }

    def _tree(self, book: Book, owner: str, period: Period, until: int) -> Tree:
        """Over the owner's receipts; kept, as who proves one is likely to prove others."""
        ledger = self._receipts.ledger
        return self._receipts.trees.of(
            (owner, period.name, until), lambda: grow_tree(ledger, book, owner, period, until=until)
        )

    def page(self, owner: str, period: Period, *, after: int, limit: int) -> list[Json]:
        """The owner's copies of its receipts of a period, after the receipt of a number, in their order."""
        with opened(self._receipts.book) as book:
            past = book.sequence_of(after) if after else 0
            with reading_statements(self._receipts.ledger) as reading:
                found = sequences_read(reading, owner, period, after=past, until=book.end().sequence)
                sequences = list(islice(found, limit))
        return self._receipts.show_all(sequences, Reader(owner=owner))


def _line(line: Line) -> Json:
    agreement, version = line.agreement or (None, None)
    value, currency = line.amount or (None, None)
    return {
        "agreement": agreement,
        "agreement_version": None if version is None else str(version),
        "amount": None if value is None else exact(value),
        "compensate": [{"rate": exact(Fraction(duty.rate)), "unit": duty.unit} for duty in line.duties],
        "currency": currency,
        "expert": line.expert,
        "requests": str(line.uses.requests),
        "share_weighted_ppm": str(line.uses.share_weighted_ppm),
        "tokens": str(line.uses.tokens),
    }


def _correction(one: Correction) -> Json:
    return {
        "amount": one.amount,
        "at": str(one.at),
        "currency": one.currency,
        "dispute": one.dispute,
        "id": one.id,
        "reason": one.reason,
        "receipt": one.request,
    }


def _totals(account: Account) -> list[Json]:
    return [{"amount": written(value, currency), "currency": currency} for currency, value in account.totals.items()]
