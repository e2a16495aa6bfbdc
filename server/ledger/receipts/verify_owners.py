"""Verify the signed sums of all owners of a period from files alone, and statements against them.

Written from docs/receipts.md. Whatever is wrong raises `ReceiptInvalid`, whose message says what.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

from flexgate.server.ledger.receipts.canonical import (
    HASH,
    NUMBER,
    Json,
    ReceiptInvalid,
    members,
    parse,
    texts,
)
from flexgate.server.ledger.receipts.verify import KEY_ID, MILLION, SERVER, Head, Keys, verify_signature
from flexgate.server.ledger.receipts.verify_statement import EXACT, MOST_BYTES, SignedStatement

_SUMS: Final = {
    "at": NUMBER,
    "end": NUMBER,
    "format": "flexgate-owners/1",
    "kid": KEY_ID,
    "last": NUMBER,
    "period": r"[^\n]+",
    "requests": NUMBER,
    "server": SERVER,
    "start": NUMBER,
    "tokens": NUMBER,
    "unrouted_tokens": NUMBER,
}
_USES: Final = {"requests": NUMBER, "share_weighted_ppm": NUMBER, "tokens": NUMBER}
Sums = dict[str, Fraction]


@dataclass(frozen=True, slots=True)
class OwnersSums:
    """Sums whose signature is valid, and which their parts have; `parts` are by owner."""

    server: str
    period: str
    last: int
    provisional: bool
    head: Head
    parts: dict[str | None, Sums]
    says: Json

    @property
    def name(self) -> str:
        """What it is, in words."""
        return f"{'provisional ' * self.provisional}sums of '{self.period}', with the parts of all owners"


def verify_owners(text: bytes, keys: Keys) -> OwnersSums:
    """The sums of a period, which all parts together must have."""
    value = members(parse(text, most=MOST_BYTES), "the file", "owners", "signature")
    said = value["owners"]
    if not isinstance(said, dict):
        raise ReceiptInvalid("'owners' must be an object")
    texts(said, "the sums", _SUMS, only=False)
    verify_signature(said, value["signature"], keys)
    head = texts(said.get("head"), "'head'", {"hash": HASH, "number": NUMBER})
    sums = _sums(texts(said.get("uses"), "'uses'", _USES), said)
    routed = int(said["tokens"]) - int(said["unrouted_tokens"])
    if sums["share_weighted_ppm"] != routed * MILLION:
        raise ReceiptInvalid(f"owners' shares sum to {sums['share_weighted_ppm']} millionths of {routed} tokens")
    parts = _parts(said.get("parts"))
    if _added(parts.values()) != _added([sums]):
        raise ReceiptInvalid("the parts of all owners do not have the sums that were signed")
    return OwnersSums(
        said["server"],
        said["period"],
        int(said["last"]),
        said.get("provisional") is not False,
        Head(said["server"], int(head["number"]), head["hash"]),
        parts,
        said,
    )


def verify_parts(sums: Iterable[OwnersSums], statements: Iterable[SignedStatement]) -> int:
    """Sums must not contradict each other, and each statement must be its owner's part in sums of the same receipts.

    Returns:
        How many statements were compared.
    """
    sums = list(sums)
    known: dict[tuple[str, str, int | None], Json] = {}
    for one in sums:
        moment = (one.server, one.period, one.last if one.provisional else None)
        lasting = {name: value for name, value in one.says.items() if name not in ("at", "head", "kid", "last")}
        if known.setdefault(moment, lasting) != lasting:
            raise ReceiptInvalid(f"{one.server} has signed two contents of the {one.name}")
    compared = 0
    statements = list(statements)
    for one in sums:
        for statement in statements:
            same = (one.server, one.period) == (statement.server, statement.period)
            if not same or not (one.last == statement.last or not (one.provisional or statement.provisional)):
                continue
            part = one.parts.get(statement.owner)
            if part is None and not statement.lines:
                continue
            if part != _of_statement(statement):
                raise ReceiptInvalid(f"the {statement.name} is not that owner's part of the sums of all owners")
            compared += 1
    return compared


def _parts(parts: Any) -> dict[str | None, Sums]:
    """The part of each owner, and of None the one of experts without an owner."""
    found: dict[str | None, Sums] = {}
    for one in _objects(parts, "'parts'"):
        owner = one.get("owner")
        if not (owner is None or isinstance(owner, str)) or owner in found:
            raise ReceiptInvalid("an owner has two parts, or no name")
        found[owner] = _sums(one, one)
    return found


def _sums(counts: Json, amounts: Json) -> Sums:
    """Counts, and amounts by their currencies."""
    texts(counts, "a part", _USES, only=False)
    found = {name: Fraction(counts[name]) for name in _USES}
    for one in _objects(amounts.get("amounts"), "'amounts'"):
        texts(one, "an amount", {"amount": EXACT, "currency": "[A-Z]{3}"})
        if one["currency"] in found:
            raise ReceiptInvalid(f"a part has two amounts in {one['currency']}")
        found[one["currency"]] = Fraction(one["amount"])
    return found


def _objects(value: Any, what: str) -> list[Json]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ReceiptInvalid(f"{what} must be a list of objects")
    return value


def _added(parts: Iterable[Sums]) -> Sums:
    found: Sums = {}
    for part in parts:
        for name, value in part.items():
            found[name] = found.get(name, Fraction()) + value
    return {name: value for name, value in found.items() if value}


def _of_statement(statement: SignedStatement) -> Sums:
    """What a statement's lines sum to."""
    lines = statement.says["lines"]
    counts = {name: sum((Fraction(line[name]) for line in lines), Fraction()) for name in _USES}
    found: Sums = dict(counts)
    for line in lines:
        if line["amount"] is not None:
            found[line["currency"]] = found.get(line["currency"], Fraction()) + Fraction(line["amount"])
    return found
