"""Verify receipts from files alone, with the public keys of the server that made them.

Written from docs/receipts.md: of what makes receipts, only the Merkle tree is used here. Whatever is wrong raises
`ReceiptInvalid`, whose message says what.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, NamedTuple

import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from flexgate.server.ledger.receipts.merkle import leaf_hash, root_from

MOST_BYTES: Final = 1 << 20
MOST_DEPTH: Final = 8
MOST_OF_A_BATCH: Final = 65_536
ROOT: Final = b"\x02"
SAFE: Final = 2**53 - 1
NOTHING_BEFORE: Final = "0" * 64
Json = dict[str, Any]
Keys = Mapping[str, Ed25519PublicKey]
_HASH: Final = "[0-9a-f]{64}"
_ID: Final = "[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]"
"""32 bytes in base64url, without bits that say nothing."""
_NUMBER: Final = "0|[1-9][0-9]{0,18}"
_RECEIPT: Final = "dec_[0-9a-f]{32}"
_HEADER: Final = {
    "at": _NUMBER,
    "first": "[1-9][0-9]{0,18}",
    "format": "flexgate-receipt-batch/1",
    "kid": _ID,
    "last": "[1-9][0-9]{0,18}",
    "number": "[1-9][0-9]{0,18}",
    "previous": _HASH,
    "root": _HASH,
    "server": "srv_[0-9a-f]{32}",
}
_JWK: Final = {
    "alg": "EdDSA",
    "crv": "Ed25519",
    "kid": _ID,
    "kty": "OKP",
    "use": "sig",
    "x": _ID,
}


class ReceiptInvalid(Exception):
    """A file is no valid receipt, chain or key set; the message says what is wrong with it."""


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
    """A valid receipt: its batch, the contents of its leaves, and whether these are all that it has."""

    receipt: str
    number: int
    batch: SignedBatch
    leaves: tuple[Json, ...]
    complete: bool
    opening: bytes | None


def parse(text: bytes) -> Any:
    """JSON in its canonical form (RFC 8785), without fractions, and at most one line break after it."""
    text = text[:-1] if text.endswith(b"\n") else text
    if len(text) > MOST_BYTES:
        raise ReceiptInvalid(f"it has more than {MOST_BYTES} bytes")
    try:
        value = json.loads(text.decode("utf-8"), parse_float=_refuse, parse_constant=_refuse)
        _require_shallow(value, MOST_DEPTH)
        canonical = rfc8785.dumps(value)
    except (ValueError, RecursionError):  # Unicode and JSON errors, and those of rfc8785, are ValueErrors
        canonical = None
    if canonical != text:
        raise ReceiptInvalid("it is not canonical JSON: it was changed, or not saved as the server sent it")
    return value


def parse_keys(text: bytes) -> Keys:
    """The keys of a JWK set by their ids."""
    keys: dict[str, Ed25519PublicKey] = {}
    members = _members(parse(text), "the key set", "keys")["keys"]
    for entry in _list(members, "'keys'"):
        values = _texts(entry, "a key", _JWK)
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
    receipt = _members(parse(text), "the receipt", "batch", "format", "hashes", "leaves", "number", optional="opening")
    batch = _members(receipt["batch"], "'batch'", "header", "path", "signature")
    _texts(receipt, "the receipt", {"format": "flexgate-receipt/1", "number": _NUMBER}, only=False)
    signed = verify_batch({"header": batch["header"], "signature": batch["signature"]}, keys)
    hashes = _hashes(receipt["hashes"])
    contents = _leaves(_list(receipt["leaves"], "'leaves'"), hashes)
    root = hashlib.sha256(ROOT + b"".join(hashes)).digest()
    size, place = signed.last - signed.first + 1, int(receipt["number"]) - signed.first
    if root_from(leaf_hash(root), place, size, _hashes(batch["path"])) != bytes.fromhex(batch["header"]["root"]):
        raise ReceiptInvalid("its leaves do not lead to the root that was signed")
    (named,) = {content["receipt"] for content in contents}
    opening = _opening(receipt, contents)
    complete = len(contents) == len(hashes)
    if complete:
        _require_consistent(contents)
    return Verified(named, int(receipt["number"]), signed, tuple(contents), complete, opening)


def verify_batch(entry: Any, keys: Keys) -> SignedBatch:
    """A batch's header with its signature, as in a chain."""
    members = _members(entry, "the batch", "header", "signature")
    header = _texts(members["header"], "the header", _HEADER)
    signature = bytes.fromhex(_texts(members, "the batch", {"signature": "[0-9a-f]{128}"}, only=False)["signature"])
    key = keys.get(header["kid"])
    if key is None:
        raise ReceiptInvalid(f"it is signed with the key {header['kid']}, which is not in the key set")
    message = rfc8785.dumps(header)
    try:
        key.verify(signature, message)
    except InvalidSignature:
        raise ReceiptInvalid("its signature is wrong: it was changed, or is another server's") from None
    first, last = int(header["first"]), int(header["last"])
    if not first <= last < first + MOST_OF_A_BATCH:
        raise ReceiptInvalid(f"its batch goes from receipt {first} to {last}")
    hash_ = hashlib.sha256(message).hexdigest()
    return SignedBatch(header["server"], int(header["number"]), first, last, header["previous"], hash_)


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
        if (next_one and not follows) or after.first <= before.last:
            raise ReceiptInvalid(f"batch {after.number} of {after.server} does not follow from batch {before.number}")


def verify_heads(batches: Iterable[SignedBatch], heads: Iterable[Head], ends: Mapping[str, int]) -> int:
    """Batches must be those of heads that were kept elsewhere; returns how many heads could be compared.

    Args:
        ends: where the chains end that are there, by server: a head of a later batch was cut off.
    """
    known = {(batch.server, batch.number): batch.hash for batch in batches}
    compared = 0
    for head in heads:
        hash_ = known.get((head.server, head.number))
        if hash_ is not None and hash_ != head.hash:
            raise ReceiptInvalid(f"batch {head.number} of {head.server} is not the one whose head was kept elsewhere")
        compared += hash_ is not None
        if head.number > ends.get(head.server, head.number):
            raise ReceiptInvalid(
                f"the chain of {head.server} ends at batch {ends[head.server]}, and the head of batch {head.number} "
                "was kept elsewhere: it was cut off or written anew"
            )
    return compared


def verify_opening(verified: Verified, name: str, body: bytes) -> None:
    """A body must be the one that a receipt has a digest of: `name` is 'prompt' or 'answer'."""
    if verified.opening is None:
        raise ReceiptInvalid("it has no opening: only the tenant's copy opens the digests of its bodies")
    digest = hashlib.sha256(verified.opening + hashlib.sha256(body).digest()).hexdigest()
    (request,) = (leaf for leaf in verified.leaves if leaf["kind"] == "request")
    if request[f"{name}_digest"] != digest:
        raise ReceiptInvalid(f"the {name} is not the one of this receipt: give the whole body, byte for byte")


def _leaves(leaves: list[Any], hashes: list[bytes]) -> list[Json]:
    """The contents of the leaves, whose hashes must be in their places."""
    contents, before = [], -1
    for entry in leaves:
        leaf = _members(entry, "a leaf", "content", "index", "salt")
        content, index = leaf["content"], leaf["index"]
        salt = bytes.fromhex(_texts(leaf, "a leaf", {"salt": _HASH}, only=False)["salt"])
        if type(index) is not int or not before < index < len(hashes):
            raise ReceiptInvalid("the places of its leaves are wrong")
        if not isinstance(content, dict) or content.get("kind") not in ("request", "owner", "none"):
            raise ReceiptInvalid("a leaf is of no known kind")
        _texts(content, "a leaf", {"receipt": _RECEIPT}, only=False)
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
    opening = bytes.fromhex(_texts(receipt, "the receipt", {"opening": _HASH}, only=False)["opening"])
    digests = [content.get("opening_digest") for content in contents if content["kind"] == "request"]
    if digests != [hashlib.sha256(opening).hexdigest()]:
        raise ReceiptInvalid("its opening is not the one of its request")
    return opening


def _require_consistent(contents: list[Json]) -> None:
    """Of a whole receipt: one request, and of each owner one leaf, with the shares that the request's leaf says."""
    requests = [content for content in contents if content["kind"] == "request"]
    owned = [
        [expert.get("expert"), content.get("owner"), expert.get("share_ppm")]
        for content in contents
        if content["kind"] == "owner"
        for expert in _objects(content.get("experts"))
    ]
    owners = [content.get("owner") for content in contents if content["kind"] == "owner"]
    said = [
        [share.get("expert"), share.get("owner"), share.get("share_ppm")]
        for request in requests
        for share in _objects(request.get("experts"))
        if share.get("owner") is not None
    ]
    if (
        len(requests) != 1
        or len({json.dumps(owner) for owner in owners}) != len(owners)
        or _sorted(owned) != _sorted(said)
    ):
        raise ReceiptInvalid("its owners' leaves are not those that its request names")


def _sorted(rows: list[list[Any]]) -> list[str]:
    return sorted(json.dumps(row) for row in rows)


def _objects(value: Any) -> list[Json]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ReceiptInvalid("a leaf has no list of experts")
    return value


def _members(value: Any, what: str, *names: str, optional: str | None = None) -> Json:
    """An object with exactly these members."""
    if not isinstance(value, dict) or value.keys() - {optional} != set(names):
        raise ReceiptInvalid(f"{what} must have {', '.join(names)}, and nothing else")
    return value


def _texts(value: Any, what: str, patterns: Mapping[str, str], *, only: bool = True) -> dict[str, str]:
    """An object whose members are strings of these patterns, and with `only` the only ones."""
    if only:
        _members(value, what, *patterns)
    for name, pattern in patterns.items():
        text = value.get(name)
        if not isinstance(text, str) or not re.fullmatch(pattern, text):
            raise ReceiptInvalid(f"'{name}' of {what} is wrong")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ReceiptInvalid(f"{what} must be a list that is not empty")
    return value


def _hashes(value: Any) -> list[bytes]:
    if not isinstance(value, list) or not all(isinstance(one, str) and re.fullmatch(_HASH, one) for one in value):
        raise ReceiptInvalid("a list of hashes has something else")
    return [bytes.fromhex(one) for one in value]


def _require_shallow(value: Any, depth: int) -> None:
    """Raise `ValueError` for what is nested too deeply, or has a number that not every reader reads alike."""
    if depth < 0 or (type(value) is int and abs(value) > SAFE):
        raise ValueError
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _require_shallow(one, depth - 1)


def _refuse(_text: str) -> Any:
    raise ValueError
