"""What all owners' experts did in a period, as one signed sum of their parts, for auditors.

The parts stand beside the sums that they must have, and beside what the requests themselves used. No owner sees them:
with few owners, the sums less its own part are its neighbour's. `docs/receipts.md` is the format.
"""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from typing import Any, Final

import rfc8785

from flexgate.server.ledger.amounts import NO_USES, Uses, exact, owed
from flexgate.server.ledger.costs import UNDER, uses
from flexgate.server.ledger.entries import MICROSECONDS, microseconds
from flexgate.server.ledger.receipts.book import opened
from flexgate.server.ledger.receipts.maker import current_key, signed
from flexgate.server.ledger.receipts.service import Receipts
from flexgate.server.ledger.receipts.signing import thumbprint
from flexgate.server.ledger.receipts.statements import TermsOf
from flexgate.server.ledger.statements import Period, newest_read, reading_statements
from flexgate.server.ledger.terms import Terms

FORMAT: Final = "flexgate-owners/1"
_INSIDE: Final = "ended_at >= ? AND ended_at < ? AND +usage.sequence <= ?"
_PARTS: Final = uses(_INSIDE, ("owner", *UNDER))
_REQUESTS: Final = (
    "SELECT count(*), coalesce(sum(prompt_tokens + completion_tokens), 0), "
    "coalesce(sum((prompt_tokens + completion_tokens) * "
    "NOT EXISTS (SELECT 1 FROM parts WHERE parts.sequence = usage.sequence AND share_ppm > 0)), 0) "
    f"FROM usage WHERE {_INSIDE}"
)
Json = dict[str, Any]


def sums_of_owners(receipts: Receipts, period: Period, terms_of: TermsOf, *, at: float, ended: bool) -> Json:
    """The signed sums of a period with each owner's part. Blocks.

    Arguments as `flexgate.server.ledger.receipts.statements.Statements.sign` takes them, and raises.
    """
    with opened(receipts.book) as book:
        public, end = current_key(book, receipts.maker.signer), book.end()
        values = (period.start * MICROSECONDS, period.end * MICROSECONDS, end.sequence)
        with reading_statements(receipts.ledger) as reading:
            rows = reading.rows(_PARTS, values)
            ((requests, tokens, unrouted),) = reading.rows(_REQUESTS, values)
            final = ended and newest_read(reading, period) <= end.sequence
        parts = _parts(rows, terms_of)
        sums = {
            "amounts": _amounts(parts),
            "at": str(microseconds(at)),
            "end": str(values[1]),
            "format": FORMAT,
            "head": {"hash": end.hash, "number": str(end.number)},
            "kid": thumbprint(public),
            "last": str(end.last),
            "parts": parts,
            "period": period.name,
            "provisional": not final,
            "requests": str(requests),
            "server": book.server,
            "start": str(values[0]),
            "tokens": str(tokens),
            "unrouted_tokens": str(unrouted),
            "uses": _counts(sum((Uses(*row[4:7]) for row in rows), NO_USES)),
        }
    return {"owners": sums, "signature": signed(receipts.maker.signer, public, rfc8785.dumps(sums)).hex()}


def _parts(rows: list[tuple[Any, ...]], terms_of: TermsOf) -> list[Json]:
    """The part of each owner, and of the experts without one."""
    terms = terms_of({Terms((row[1], row[2]), row[3]) for row in rows if row[1] is not None})
    sums: dict[str | None, Uses] = defaultdict(lambda: NO_USES)
    amounts: dict[str | None, dict[str, Fraction]] = defaultdict(dict)
    for owner, agreement, version, _, *counts in rows:
        sums[owner] += Uses(*counts)
        paid = None if agreement is None else owed(terms[agreement, version].duties, Uses(*counts))
        if paid is not None:
            amounts[owner][paid[1]] = amounts[owner].get(paid[1], Fraction()) + paid[0]
    return [
        {
            "amounts": [{"amount": exact(value), "currency": name} for name, value in sorted(amounts[owner].items())],
            "owner": owner,
            **_counts(sums[owner]),
        }
        for owner in sorted(sums, key=lambda name: (name is not None, name or ""))
    ]


def _amounts(parts: list[Json]) -> list[Json]:
    sums: dict[str, Fraction] = {}
    for one in (one for part in parts for one in part["amounts"]):
        sums[one["currency"]] = sums.get(one["currency"], Fraction()) + Fraction(one["amount"])
    return [{"amount": exact(value), "currency": currency} for currency, value in sorted(sums.items())]


def _counts(of: Uses) -> Json:
    return {
        "requests": str(of.requests),
        "share_weighted_ppm": str(of.share_weighted_ppm),
        "tokens": str(of.tokens),
    }
