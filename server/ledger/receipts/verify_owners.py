"""Verify the signed sums of all owners of a period from files alone, and statements against them.

Written from docs/receipts.md. Whatever is wrong raises `ReceiptInvalid`, whose message says what.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import rfc8785

from flexgate.server.ledger.receipts.canonical import (
    HASH,
    NUMBER,
    Json,
    ReceiptInvalid,
    hashes_of,
    list_of,
    members,
    parse,
    texts,
)
from flexgate.server.ledger.receipts.merkle import leaf_hash, root
from flexgate.server.ledger.receipts.verify import KEY_ID, MILLION, SERVER, Head, Keys, verify_signature
from flexgate.server.ledger.receipts.verify_statement import EXACT, SignedStatement

_TOTALS: Final = {
    "at": NUMBER,
    "end": NUMBER,
    "format": "flexgate-owners/1",
    "kid": KEY_ID,
    "last": NUMBER,
    "period": r"[^\n]+",
    "requests": NUMBER,
    "root": HASH,
    "server": SERVER,
    "start": NUMBER,
    "tokens": NUMBER,
    "unrouted_tokens": NUMBER,
}
_USES: Final = {"requests": NUMBER, "share_weighted_ppm": NUMBER, "tokens": NUMBER}
Sums = dict[str, Fraction]


@dataclass(frozen=True, slots=True)
class OwnersSums:
    """Sums whose signature is valid; `leaves` are those that are shown, by owner."""

    server: str
    period: str
    last: int
    provisional: bool
    head: Head
    leaves: dict[str, Sums]
    complete: bool
    says: Json

    @property
    def name(self) -> str:
        """What it is, in words."""
        shown = "all owners" if self.complete else ", ".join(f"'{owner}'" for owner in self.leaves)
        return f"{'provisional ' * self.provisional}sums of '{self.period}', with the parts of {shown}"


def verify_owners(text: bytes, keys: Keys) -> OwnersSums:
    """The sums of a period: the leaves must be those that are signed, and all together have the signed sums."""
    value = members(parse(text), "the file", "hashes", "leaves", "signature", "totals")
    totals = value["totals"]
    if not isinstance(totals, dict):
        raise ReceiptInvalid("'totals' must be an object")
    texts(totals, "the totals", _TOTALS, only=False)
    verify_signature(totals, value["signature"], keys)
    head = texts(totals.get("head"), "'head'", {"hash": HASH, "number": NUMBER})
    hashes = hashes_of(value["hashes"])
    if root(hashes).hex() != totals["root"]:
        raise ReceiptInvalid("its leaves are not those that were signed")
    contents = _contents(list_of(value["leaves"], "'leaves'"), hashes)
    sums = _sums(texts(totals.get("uses"), "'uses'", _USES), totals)
    routed = int(totals["tokens"]) - int(totals["unrouted_tokens"])
    if sums["share_weighted_ppm"] != routed * MILLION:
        raise ReceiptInvalid(f"owners' shares sum to {sums['share_weighted_ppm']} millionths of {routed} tokens")
    parts = [_sums(content, content) for content in contents if content["kind"] != "none"]
    if len(contents) == len(hashes) and _added(parts) != _added([sums]):
        raise ReceiptInvalid("the parts of all owners do not have the sums that were signed")
    owners = [content["owner"] for content in contents if content["kind"] == "owner"]
    if len(set(owners)) != len(owners):
        raise ReceiptInvalid("an owner has two parts")
    return OwnersSums(
        totals["server"],
        totals["period"],
        int(totals["last"]),
        totals.get("provisional") is not False,
        Head(totals["server"], int(head["number"]), head["hash"]),
        {content["owner"]: _sums(content, content) for content in contents if content["kind"] == "owner"},
        len(contents) == len(hashes),
        totals,
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
            part = one.leaves.get(statement.owner)
            if part is None and not (one.complete and statement.lines):
                continue
            if part != _of_statement(statement):
                raise ReceiptInvalid(f"the {statement.name} is not that owner's part of the sums of all owners")
            compared += 1
    return compared


def _contents(leaves: list[Any], hashes: list[bytes]) -> list[Json]:
    found, before = [], -1
    for entry in leaves:
        leaf = members(entry, "a leaf", "content", "index", "salt")
        content, index = leaf["content"], leaf["index"]
        salt = bytes.fromhex(texts(leaf, "a leaf", {"salt": HASH}, only=False)["salt"])
        if type(index) is not int or not before < index < len(hashes) or not isinstance(content, dict):
            raise ReceiptInvalid("the places of its leaves are wrong")
        if leaf_hash(salt + rfc8785.dumps(content)) != hashes[index]:
            raise ReceiptInvalid("a leaf is not the one that was signed in its place: it was changed")
        kind = texts(content, "a leaf", {"kind": "owner|common|none"}, only=False)["kind"]
        if kind == "owner":
            texts(content, "an owner's leaf", {"owner": r"[^\n]+"}, only=False)
        found.append(content)
        before = index
    return found


def _sums(counts: Json, amounts: Json) -> Sums:
    """Counts, and amounts by their currencies."""
    texts(counts, "a part", _USES, only=False)
    found = {name: Fraction(counts[name]) for name in _USES}
    for one in amounts.get("amounts", ()):
        texts(one, "an amount", {"amount": EXACT, "currency": "[A-Z]{3}"})
        if one["currency"] in found:
            raise ReceiptInvalid(f"a part has two amounts in {one['currency']}")
        found[one["currency"]] = Fraction(one["amount"])
    return found


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
