"""Verify receipts from files alone, with the public keys of the server that made them.

Written from docs/receipts.md: of what makes receipts, only the Merkle tree is used here. Whatever is wrong raises
`ReceiptInvalid`, whose message says what.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, NamedTuple

import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

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
from flexgate.server.ledger.receipts.merkle import leaf_hash, root_from

MOST_OF_A_BATCH: Final = 65_536
ROOT: Final = b"\x02"
MILLION: Final = 1_000_000
FACTS: Final = ("completion_tokens", "ended_at", "outcome", "prompt_tokens")
"""What an owner's leaf says of the request as the request's own does."""
NOTHING_BEFORE: Final = "0" * 64
Keys = Mapping[str, Ed25519PublicKey]
KEY_ID: Final = "[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]"
"""32 bytes in base64url, without bits that say nothing."""
RECEIPT: Final = "dec_[0-9a-f]{32}(_counterfactual)?"
"""A decision, or the calls without one expert that explain it."""
SERVER: Final = "srv_[0-9a-f]{32}"
_HEADER: Final = {
    "at": NUMBER,
    "first": "[1-9][0-9]{0,18}",
    "format": "flexgate-receipt-batch/1",
    "kid": KEY_ID,
    "last": "[1-9][0-9]{0,18}",
    "number": "[1-9][0-9]{0,18}",
    "previous": HASH,
    "root": HASH,
    "server": SERVER,
}
_LEFT_OUT: Final = {"expert": r"[^\n]+", "grade": "removed|router|shared|unknown"}
_JWK: Final = {
    "alg": "EdDSA",
    "crv": "Ed25519",
    "kid": KEY_ID,
    "kty": "OKP",
    "use": "sig",
    "x": KEY_ID,
}


@dataclass(frozen=True, slots=True)
class SignedBatch:
    """A batch whose signature is valid."""

    server: str
    number: int
    first: int
    last: int
    previous: str
    hash: str


class Head(NamedTuple):
    """The end of a chain, as it was kept elsewhere."""

    server: str
    number: int
    hash: str


@dataclass(frozen=True, slots=True)
class Verified:
    """A valid receipt: its batch, the contents of the leaves that are shown, their places, and how many it has."""

    receipt: str
    number: int
    batch: SignedBatch
    leaves: tuple[Json, ...]
    places: tuple[int, ...]
    size: int
    root: bytes
    opening: bytes | None

    @property
    def complete(self) -> bool:
        """Whether it shows all leaves of the receipt."""
        return len(self.leaves) == self.size


def parse_keys(text: bytes) -> Keys:
    """The keys of a JWK set by their ids."""
    keys: dict[str, Ed25519PublicKey] = {}
    for entry in list_of(members(parse(text), "the key set", "keys")["keys"], "'keys'"):
        values = texts(entry, "a key", _JWK)
        public = base64.urlsafe_b64decode(values["x"] + "=")
        canonical = f'{{"crv":"Ed25519","kty":"OKP","x":"{values["x"]}"}}'
        if base64.urlsafe_b64decode(values["kid"] + "=") != hashlib.sha256(canonical.encode()).digest():
            raise ReceiptInvalid(f"the key id {values['kid']} is not its key's thumbprint")
        if values["kid"] in keys:
            raise ReceiptInvalid(f"the key {values['kid']} is there twice")
        keys[values["kid"]] = Ed25519PublicKey.from_public_bytes(public)
    return keys


def verify_receipt(text: bytes, keys: Keys) -> Verified:
    """A party's copy of a receipt."""
    receipt = members(parse(text), "the receipt", "batch", "format", "hashes", "leaves", "number", optional="opening")
    batch = members(receipt["batch"], "'batch'", "header", "path", "signature")
    texts(receipt, "the receipt", {"format": "flexgate-receipt/1", "number": NUMBER}, only=False)
    signed = verify_batch({"header": batch["header"], "signature": batch["signature"]}, keys)
    hashes = hashes_of(receipt["hashes"])
    contents = _leaves(list_of(receipt["leaves"], "'leaves'"), hashes)
    root = hashlib.sha256(ROOT + b"".join(hashes)).digest()
    size, place = signed.last - signed.first + 1, int(receipt["number"]) - signed.first
    if root_from(leaf_hash(root), place, size, hashes_of(batch["path"])) != bytes.fromhex(batch["header"]["root"]):
        raise ReceiptInvalid("its leaves do not lead to the root that was signed")
    (named,) = {content["receipt"] for content in contents}
    opening = _opening(receipt, contents)
    complete = len(contents) == len(hashes)
    _require_consistent(contents, complete=complete)
    places = tuple(leaf["index"] for leaf in receipt["leaves"])
    return Verified(named, int(receipt["number"]), signed, tuple(contents), places, len(hashes), root, opening)


def verify_batch(entry: Any, keys: Keys) -> SignedBatch:
    """A batch's header with its signature, as in a chain."""
    batch = members(entry, "the batch", "header", "signature")
    header = texts(batch["header"], "the header", _HEADER)
    message = verify_signature(header, batch["signature"], keys)
    first, last = int(header["first"]), int(header["last"])
    if not first <= last < first + MOST_OF_A_BATCH:
        raise ReceiptInvalid(f"its batch goes from receipt {first} to {last}")
    number, previous = int(header["number"]), header["previous"]
    if first < number or (number == 1 and (first != 1 or previous != NOTHING_BEFORE)):
        raise ReceiptInvalid(f"its batch {number} cannot begin with receipt {first} after {previous}")
    hash_ = hashlib.sha256(message).hexdigest()
    return SignedBatch(header["server"], number, first, last, previous, hash_)


def verify_signature(value: Json, signature: Any, keys: Keys) -> bytes:
    """What is signed must be the canonical form of an object that names its key in `kid`; returns that form."""
    texts({"signature": signature}, "the signature", {"signature": "[0-9a-f]{128}"})
    key = keys.get(value["kid"])
    if key is None:
        raise ReceiptInvalid(f"it is signed with the key {value['kid']}, which is not in the key set")
    message = rfc8785.dumps(value)
    try:
        key.verify(bytes.fromhex(signature), message)
    except InvalidSignature:
        raise ReceiptInvalid("its signature is wrong: it was changed, or is another server's") from None
    return message


def verify_chain(batches: Sequence[SignedBatch]) -> None:
    """Batches must be of one server, and follow from each other without a gap."""
    for before, after in pairwise(batches):
        if (after.server, after.number) != (before.server, before.number + 1):
            raise ReceiptInvalid(f"batch {after.number} follows batch {before.number}: one between them is missing")
    verify_order(batches)


def verify_order(batches: Iterable[SignedBatch]) -> None:
    """Batches of one server must follow from each other, as far as they are there."""
    known: dict[tuple[str, int], SignedBatch] = {}
    for batch in batches:
        other = known.setdefault((batch.server, batch.number), batch)
        if other != batch:
            raise ReceiptInvalid(f"{batch.server} has signed two batches {batch.number}: its chain is forked")
    ordered = [known[key] for key in sorted(known)]
    for before, after in pairwise(ordered):
        if before.server != after.server:
            continue
        next_one = after.number == before.number + 1
        follows = after.previous == before.hash and after.first == before.last + 1
        skipped, between = after.first - before.last - 1, after.number - before.number - 1
        if (next_one and not follows) or skipped < between:
            raise ReceiptInvalid(f"batch {after.number} of {after.server} does not follow from batch {before.number}")


def verify_copies(found: Iterable[Verified]) -> None:
    """Copies must tell one history: a request has one receipt, and what copies of it show fits together."""
    numbers: dict[str, tuple[str, int]] = {}
    copies: dict[tuple[str, int], list[Verified]] = defaultdict(list)
    for one in found:
        place = one.batch.server, one.number
        if numbers.setdefault(one.receipt, place) != place:
            raise ReceiptInvalid(f"'{one.receipt}' has two receipts: {numbers[one.receipt]} and {place}")
        copies[place].append(one)
    for same in copies.values():
        leaves = {index: leaf for one in same for index, leaf in zip(one.places, one.leaves, strict=True)}
        if len({one.receipt for one in same}) > 1:
            raise ReceiptInvalid(f"number {same[0].number} is of two receipts")
        _require_consistent(leaves.values(), complete=len(leaves) == same[0].size)


def verify_contained(chain: Sequence[SignedBatch], batches: Iterable[SignedBatch], heads: Iterable[Head]) -> None:
    """Receipts' batches and heads must be in a chain, unless they are from before its first batch."""
    known = {(batch.server, batch.number): batch.hash for batch in chain}
    starts: dict[str, int] = {}
    for batch in chain:
        starts[batch.server] = min(batch.number, starts.get(batch.server, batch.number))
    for one in (*(Head(batch.server, batch.number, batch.hash) for batch in batches), *heads):
        if one.number >= starts.get(one.server, 0) and known.get((one.server, one.number)) != one.hash:
            last = max((number for server, number in known if server == one.server), default=0)
            raise ReceiptInvalid(
                f"the chain of {one.server} ends at batch {last}, and a head or receipt of batch {one.number} that is "
                "not in it was kept elsewhere: it was cut off or written anew, or is older, or another server's"
            )


def verify_ends(ends: Iterable[tuple[Head, int]], batches: Iterable[SignedBatch]) -> None:
    """Where statements and sums end, a batch must end; each with the number of the last receipt."""
    known: dict[tuple[str, int], tuple[str, int]] = {}
    for head, last in (*ends, *((Head(one.server, one.number, one.hash), one.last) for one in batches)):
        if known.setdefault((head.server, head.number), (head.hash, last)) != (head.hash, last):
            raise ReceiptInvalid(
                f"what was given of {head.server} ends in two ways with batch {head.number}: its chain is forked, or a "
                "statement leaves out receipts of that batch"
            )
    for before, after in pairwise(sorted(known)):
        last, later = known[before][1], known[after][1]
        if before[0] == after[0] and later <= last:
            raise ReceiptInvalid(
                f"batch {after[1]} of {after[0]} ends with receipt {later}, and an earlier one with receipt {last}"
            )


def verify_heads(batches: Iterable[SignedBatch], heads: Iterable[Head]) -> int:
    """Batches must be those of heads that were kept elsewhere; returns how many heads could be compared, at least 1."""
    known = {(batch.server, batch.number): batch.hash for batch in batches}
    compared = 0
    for head in heads:
        hash_ = known.get((head.server, head.number), head.hash)
        if hash_ != head.hash:
            raise ReceiptInvalid(f"batch {head.number} of {head.server} is not the one whose head was kept elsewhere")
        compared += (head.server, head.number) in known
    if not compared:
        raise ReceiptInvalid("no head is of a batch that was given: give the chain from 'flexgate receipts chain'")
    return compared


def verify_opening(verified: Verified, name: str, body: bytes) -> None:
    """A body must be the one that a receipt has a digest of: `name` is 'prompt' or 'answer'."""
    if verified.opening is None:
        raise ReceiptInvalid("it has no opening: only the tenant's copy opens the digests of its bodies")
    digest = hashlib.sha256(verified.opening + hashlib.sha256(body).digest()).hexdigest()
    (request,) = (leaf for leaf in verified.leaves if leaf["kind"] == "request")
    if request.get(f"{name}_digest") != digest:
        raise ReceiptInvalid(f"the {name} is not the one of this receipt: give the whole body, byte for byte")


def _leaves(leaves: list[Any], hashes: list[bytes]) -> list[Json]:
    """The contents of the leaves, whose hashes must be in their places."""
    contents, before = [], -1
    for entry in leaves:
        leaf = members(entry, "a leaf", "content", "index", "salt")
        content, index = leaf["content"], leaf["index"]
        salt = bytes.fromhex(texts(leaf, "a leaf", {"salt": HASH}, only=False)["salt"])
        if type(index) is not int or not before < index < len(hashes):
            raise ReceiptInvalid("the places of its leaves are wrong")
        if not isinstance(content, dict) or content.get("kind") not in ("request", "owner", "hidden", "none"):
            raise ReceiptInvalid("a leaf is of no known kind")
        texts(content, "a leaf", {"receipt": RECEIPT}, only=False)
        if leaf_hash(salt + rfc8785.dumps(content)) != hashes[index]:
            raise ReceiptInvalid("a leaf is not the one that its receipt has in its place: it was changed")
        contents.append(content)
        before = index
    if len({content["receipt"] for content in contents}) != 1:
        raise ReceiptInvalid("its leaves are of several receipts")
    return contents


def _opening(receipt: Json, contents: list[Json]) -> bytes | None:
    if "opening" not in receipt:
        return None
    opening = bytes.fromhex(texts(receipt, "the receipt", {"opening": HASH}, only=False)["opening"])
    digests = [content.get("opening_digest") for content in contents if content["kind"] == "request"]
    if digests != [hashlib.sha256(opening).hexdigest()]:
        raise ReceiptInvalid("its opening is not the one of its request")
    return opening


def _require_consistent(leaves: Iterable[Json], *, complete: bool) -> None:
    """Of one receipt: at most one request, and of each owner at most one leaf, which says what the request says.

    Args:
        complete: whether these are all leaves, so that neither the request nor an owner may be missing.
    """
    leaves = list(leaves)
    of = {kind: [leaf for leaf in leaves if leaf["kind"] == kind] for kind in ("request", "owner", "hidden")}
    requests, owned, hidden = of.values()
    for leaf in (*requests, *owned):
        _require_shares(leaf)
    _require_left_out([*requests, *owned], [*requests, *hidden])
    if len(hidden) > 1:
        raise ReceiptInvalid("it has two leaves of what is hidden")
    said = {_owner(leaf): _said(leaf, leaf["experts"]) for leaf in owned}
    if len(requests) > 1 or len(said) != len(owned) or (complete and not requests):
        raise ReceiptInvalid("it must have one request, and of each owner one leaf")
    for request in requests:
        named: dict[str, list[Json]] = defaultdict(list)
        for share in request["experts"]:
            if share.get("owner") is not None:
                named[_owner(share)].append(share)
        wanted = {owner: _said(request, shares) for owner, shares in named.items()}
        if any(wanted.get(owner) != one for owner, one in said.items()) or (complete and wanted != said):
            raise ReceiptInvalid("its owners' leaves are not what its request says")


def _require_shares(leaf: Json) -> None:
    """Shares are whole millionths: of a request, all of it or none."""
    shares: list[Any] = [expert.get("share_ppm") for expert in _objects(leaf.get("experts"))]
    if not all(type(share) is int and 0 <= share <= MILLION for share in shares):
        raise ReceiptInvalid("a share is no number of millionths")
    total = sum(shares)
    if total > MILLION or (leaf["kind"] == "request" and total not in (0, MILLION)):
        raise ReceiptInvalid(f"its shares sum to {total} millionths")


def _require_left_out(used: list[Json], excluding: list[Json]) -> None:
    """What was left out must have taken no part, and has the grade of its exclusion."""
    left_out = [one for leaf in excluding for one in _objects(leaf.get("excluded", []))]
    names = {texts(one, "what was left out", _LEFT_OUT, only=False)["expert"] for one in left_out}
    took_part = {json.dumps(one.get("expert")) for leaf in used for one in leaf["experts"]}
    if len(names) != len(left_out) or not took_part.isdisjoint(map(json.dumps, names)):
        raise ReceiptInvalid("an expert was left out twice, or took part as well")


def _said(leaf: Json, shares: list[Json]) -> str:
    """What a request says of an owner's experts, or that owner's leaf of them."""
    rows = sorted(json.dumps([share.get("expert"), share["share_ppm"]]) for share in shares)
    return json.dumps([*(leaf.get(fact) for fact in FACTS), rows])


def _owner(value: Json) -> str:
    owner = value.get("owner")
    if not isinstance(owner, str):
        raise ReceiptInvalid("an owner has no name")
    return owner


def _objects(value: Any) -> list[Json]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ReceiptInvalid("a leaf has no list of experts")
    return value
