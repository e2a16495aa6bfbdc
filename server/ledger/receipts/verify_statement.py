"""Verify signed statements from files alone, against the receipts that they must count.

Written from docs/receipts.md. Whatever is wrong raises `ReceiptInvalid`, whose message says what.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, NamedTuple

from flexgate.server.ledger.receipts import merkle
from flexgate.server.ledger.receipts.canonical import (
    HASH,
    NUMBER,
    Json,
    ReceiptInvalid,
    hashes_of,
    members,
    parse,
    texts,
)
from flexgate.server.ledger.receipts.verify import KEY_ID, RECEIPT, SERVER, Head, Keys, Verified, verify_signature
from flexgate.server.ledger.statements import Period

MOST_BYTES: Final = 16 << 20
EXACT: Final = r"(0|[1-9][0-9]{0,30})(\.[0-9]{1,21})?"
SIGNED: Final = "-?" + EXACT
CURRENCY: Final = "[A-Z]{3}"
_NAME: Final = r"[^\n]+"
_STATEMENT: Final = {
    "at": NUMBER,
    "end": NUMBER,
    "format": "flexgate-statement/1",
    "kid": KEY_ID,
    "last": NUMBER,
    "owner": _NAME,
    "period": _NAME,
    "receipts": NUMBER,
    "root": HASH,
    "server": SERVER,
    "start": NUMBER,
}
_TOTAL: Final = {"amount": SIGNED, "currency": CURRENCY}
_CORRECTION: Final = {**_TOTAL, "at": NUMBER, "id": _NAME, "reason": _NAME, "receipt": RECEIPT}
_PROOF: Final = {
    "format": "flexgate-statement-proof/1",
    "index": NUMBER,
    "number": NUMBER,
    "owner": _NAME,
    "period": _NAME,
    "receipt": RECEIPT,
    "receipts": NUMBER,
    "root": HASH,
    "server": SERVER,
}
_COUNTS: Final = ("requests", "share_weighted_ppm", "tokens")
_PER: Final = {
    "request": ("requests", 1),
    "thousand_tokens": ("tokens", 10**3),
    "thousand_share_weighted_tokens": ("share_weighted_ppm", 10**9),
    "million_tokens": ("tokens", 10**6),
    "million_share_weighted_tokens": ("share_weighted_ppm", 10**12),
}
"""Of each unit, what it counts, and how many are one."""
_DIGITS: Final = {
    currency: digits
    for digits, currencies in (
        (0, "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF"),
        (3, "BHD IQD JOD KWD LYD OMR TND"),
        (4, "CLF UYW"),
    )
    for currency in currencies.split()
}
"""After the point, of currencies that have not two; ISO 4217."""
Place = tuple[str | None, str | None, str]
"""Agreement, version and expert of a line."""
Counts = tuple[int, ...]
"""As `_COUNTS` names them, requests first."""
NO_COUNTS: Final[Counts] = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class SignedStatement:
    """A statement whose signature is valid, and whose amounts follow from its lines."""

    server: str
    owner: str
    period: str
    start: int
    end: int
    provisional: bool
    last: int
    receipts: int
    root: bytes
    head: Head
    lines: dict[Place, Counts]
    totals: tuple[tuple[str, str], ...]
    says: Json

    @property
    def name(self) -> str:
        """What it is, in words."""
        return f"{'provisional ' * self.provisional}statement of '{self.period}' for '{self.owner}'"

    def counts(self, copy: Verified) -> Json | None:
        """The owner's leaf of a receipt that the statement must count; None of others."""
        if copy.batch.server != self.server or (self.provisional and copy.number > self.last):
            return None
        return self.leaf_of(copy)

    def leaf_of(self, copy: Verified) -> Json | None:
        """The owner's leaf of a receipt of the period, of whatever server; None of others."""
        for leaf in copy.leaves:
            if (
                leaf["kind"] == "owner"
                and leaf["owner"] == self.owner
                and self.start <= int(leaf["ended_at"]) < self.end
            ):
                return leaf
        return None


class Proof(NamedTuple):
    """A path that claims to lead from a receipt to the root of a statement. Nothing of it is signed."""

    receipt: str
    server: str
    owner: str
    period: str
    place: int
    path: tuple[bytes, ...]


def verify_statement(text: bytes, keys: Keys) -> SignedStatement:
    """A signed statement by itself: its signature, its period, and every amount from rates and counts."""
    value = members(parse(text, most=MOST_BYTES), "the file", "signature", "statement")
    said = value["statement"]
    if not isinstance(said, dict):
        raise ReceiptInvalid("'statement' must be an object")
    texts(said, "the statement", _STATEMENT, only=False)
    verify_signature(said, value["signature"], keys)
    head = texts(said.get("head"), "'head'", {"hash": HASH, "number": NUMBER})
    period, start, end = Period.of(said["period"]), int(said["start"]), int(said["end"])
    if period is None or (start, end) != (period.start * 10**6, period.end * 10**6):
        raise ReceiptInvalid(f"its times are not those of the period '{said['period']}'")
    if type(said.get("provisional")) is not bool:
        raise ReceiptInvalid("it does not say whether it is provisional")
    lines, amounts = _lines(said.get("lines"))
    corrections = _objects(said.get("corrections"), "'corrections'")
    for one in corrections:
        if not start <= int(texts(one, "a correction", _CORRECTION, only=False)["at"]) < end:
            raise ReceiptInvalid(f"the correction '{one['id']}' was made in another period")
        amounts.append((one["currency"], Fraction(one["amount"])))
    if len({one["id"] for one in corrections}) != len(corrections):
        raise ReceiptInvalid("a correction is there twice")
    return SignedStatement(
        said["server"],
        said["owner"],
        said["period"],
        start,
        end,
        said["provisional"],
        int(said["last"]),
        int(said["receipts"]),
        bytes.fromhex(said["root"]),
        Head(said["server"], int(head["number"]), head["hash"]),
        lines,
        _totals(said.get("totals"), amounts),
        said,
    )


def parse_proof(text: bytes) -> Proof:
    """A proof, which says nothing before it was compared with a statement and a receipt."""
    value = members(parse(text), "the proof", "path", *_PROOF)
    texts(value, "the proof", _PROOF, only=False)
    path = tuple(hashes_of(value["path"]))
    return Proof(value["receipt"], value["server"], value["owner"], value["period"], int(value["index"]), path)


def verify_statements(
    statements: Sequence[SignedStatement], copies: Iterable[Verified], proofs: Iterable[Proof]
) -> list[str]:
    """Statements must not contradict each other, and each must count the receipts of its owner that were given.

    Returns:
        Of each statement, what was compared, in words.
    """
    finals: dict[tuple[str, str, str], SignedStatement] = {}
    for one in statements:
        if not one.provisional:
            other = finals.setdefault((one.server, one.owner, one.period), one)
            if _lasting(other) != _lasting(one):
                raise ReceiptInvalid(f"{one.server} has signed two contents of the {one.name}")
    copies, proofs = list(copies), list(proofs)
    stated = {(one.server, one.owner, one.period) for one in statements}
    for one in statements:
        for copy in copies:
            if (copy.batch.server, one.owner, one.period) not in stated and one.leaf_of(copy) is not None:
                raise ReceiptInvalid(
                    f"'{copy.receipt}' is of {copy.batch.server}, and the {one.name} of {one.server}, which does not "
                    "count it: give that server's statement, too; if there is none, the receipt was left out"
                )
    return [_compare(one, copies, proofs) for one in statements]


def _compare(statement: SignedStatement, copies: list[Verified], proofs: list[Proof]) -> str:
    counted = {copy.number: (copy, leaf) for copy in copies if (leaf := statement.counts(copy)) is not None}
    if len(counted) > statement.receipts:
        raise ReceiptInvalid(
            f"the {statement.name} counts {statement.receipts} receipts, and {len(counted)} were given: it leaves out "
            "receipts that it must count"
        )
    ordered = [counted[number] for number in sorted(counted)]
    missing = statement.receipts - len(counted)
    if not missing and merkle.root(merkle.leaf_hash(copy.root) for copy, _ in ordered) != statement.root:
        raise ReceiptInvalid(f"the {statement.name} counts other receipts than those that were given")
    _require_figures([leaf for _, leaf in ordered], missing, statement)
    if not missing:
        return f"it counts the {len(counted)} receipts that were given, and no others; its figures are theirs"
    _require_proved([copy for copy, _ in ordered], proofs, statement)
    return (
        f"it counts the {len(counted)} receipts that were given, of {statement.receipts}; its figures were not made "
        f"again: {missing} are missing"
    )


def _require_proved(ordered: list[Verified], proofs: list[Proof], statement: SignedStatement) -> None:
    """Of each receipt there must be a path to the root, from places in the order of their numbers."""
    paths = {
        proof.receipt: proof for proof in proofs if proof[1:4] == (statement.server, statement.owner, statement.period)
    }
    before = -1
    for copy in ordered:
        proof = paths.get(copy.receipt)
        if proof is None:
            raise ReceiptInvalid(
                f"the {statement.name} counts {statement.receipts} receipts, {len(ordered)} were given, and nothing "
                f"shows that '{copy.receipt}' is among them: give its proof from 'flexgate statements prove', or all "
                "receipts; if the server has no proof, the receipt was left out"
            )
        hash_ = merkle.leaf_hash(copy.root)
        if merkle.root_from(hash_, proof.place, statement.receipts, proof.path) != statement.root:
            raise ReceiptInvalid(f"the proof does not lead from '{copy.receipt}' to the root of the {statement.name}")
        if proof.place <= before:
            raise ReceiptInvalid(f"the {statement.name} does not have '{copy.receipt}' behind those before it")
        before = proof.place


def _require_figures(leaves: Iterable[Json], missing: int, statement: SignedStatement) -> None:
    """Every line must be what receipts add to it; those that were not given may make up the rest."""
    sums: dict[Place, Counts] = {}
    for leaf in leaves:
        for place, counts in _uses(leaf):
            sums[place] = tuple(map(sum, zip(sums.get(place, NO_COUNTS), counts, strict=True)))
    for place in sums.keys() | statement.lines:
        if not _fits(statement.lines.get(place), sums.get(place), missing):
            raise ReceiptInvalid(f"the {statement.name} has other figures than its receipts, of {list(place)}")


def _fits(line: Counts | None, given: Counts | None, missing: int) -> bool:
    """Whether so many missing receipts, of which each adds at most one request, can make up the rest of a line."""
    if line is None:
        return False
    more = [count - other for count, other in zip(line, given or NO_COUNTS, strict=True)]
    return line == given if not more[0] else min(more) >= 0 and more[0] <= missing


def _uses(leaf: Json) -> Iterator[tuple[Place, Counts]]:
    """What one request adds to each line."""
    whole = _number(leaf, "prompt_tokens") + _number(leaf, "completion_tokens")
    for expert in leaf["experts"]:
        positions = _number(expert, "prompt_positions") + _number(expert, "completion_positions")
        yield _place(expert), (1, whole * expert["share_ppm"], positions)


def _lines(lines: Any) -> tuple[dict[Place, Counts], list[tuple[str, Fraction]]]:
    """The counts of each line, and the amounts by their currencies, which must be what rates make of counts."""
    found: dict[Place, Counts] = {}
    amounts = []
    for line in _objects(lines, "'lines'"):
        place = _place(line)
        if place in found:
            raise ReceiptInvalid(f"the line of {list(place)} is there twice")
        found[place] = tuple(_number(line, name) for name in _COUNTS)
        duties = _objects(line.get("compensate"), "'compensate'")
        amount = sum((_paid(duty, line) for duty in duties), Fraction())
        if not duties and (line.get("amount"), line.get("currency")) == (None, None):
            continue
        texts(line, "a line", {"amount": EXACT, "currency": CURRENCY}, only=False)
        if not duties or Fraction(line["amount"]) != amount:
            raise ReceiptInvalid(f"the amount of {list(place)} is not what its rates make of its counts")
        amounts.append((line["currency"], amount))
    return found, amounts


def _paid(duty: Json, line: Json) -> Fraction:
    texts(duty, "a rate", {"rate": EXACT, "unit": "|".join(_PER)})
    name, per = _PER[duty["unit"]]
    return Fraction(duty["rate"]) * _number(line, name) / per


def _totals(totals: Any, amounts: list[tuple[str, Fraction]]) -> tuple[tuple[str, str], ...]:
    """Each currency's total, which must be its amounts' sum, rounded once, half to even, to the digits that it has."""
    sums: dict[str, Fraction] = {}
    for currency, amount in amounts:
        sums[currency] = sums.get(currency, Fraction()) + amount
    found: dict[str, str] = {}
    for total in _objects(totals, "'totals'"):
        texts(total, "a total", _TOTAL)
        currency, amount = total["currency"], total["amount"]
        digits = len(amount.partition(".")[2])
        if digits < _DIGITS.get(currency, 2):
            raise ReceiptInvalid(f"its total in {currency} has too few digits: {amount}")
        scale = 10**digits
        if currency in found or Fraction(amount) * scale != round(sums.get(currency, Fraction()) * scale):
            raise ReceiptInvalid(f"its total in {currency} is not the sum of its lines")
        found[currency] = amount
    if found.keys() != sums.keys():
        raise ReceiptInvalid("it has not one total for each currency")
    return tuple(found.items())


def _lasting(statement: SignedStatement) -> Json:
    """What no two final statements of an owner and period may say differently."""
    return {name: value for name, value in statement.says.items() if name not in ("at", "head", "kid", "last")}


def _place(value: Json) -> Place:
    """Of an expert in a receipt, or of a line."""
    agreement, version, expert = (value.get(name) for name in ("agreement", "agreement_version", "expert"))
    if not isinstance(expert, str) or {type(agreement), type(version)} - {str, type(None)}:
        raise ReceiptInvalid("a line or a part of a receipt does not name an expert and an agreement")
    return agreement, version, expert


def _number(value: Json, name: str) -> int:
    return int(texts(value, f"'{name}'", {name: NUMBER}, only=False)[name])


def _objects(value: Any, what: str) -> list[Json]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ReceiptInvalid(f"{what} must be a list of objects")
    return value
