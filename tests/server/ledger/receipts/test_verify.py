"""Both verifiers, ours and the one in JavaScript, take the same receipts: those that were signed, byte for byte."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from flexgate.server.ledger.receipts import merkle, verify
from flexgate.server.ledger.receipts.batches import Header
from flexgate.server.ledger.receipts.canonical import ReceiptInvalid
from flexgate.server.ledger.receipts.signing import jwk, raw_public_key

NODE = shutil.which("node")
JUDGE = Path(__file__).with_name("judge.mjs")
Text = Callable[..., bytes]


def python_says(jwks: bytes, texts: list[bytes]) -> list[str]:
    """What is wrong with each; empty where nothing is."""
    found = []
    for text in texts:
        try:
            verify.verify_receipt(text, verify.parse_keys(jwks))
            found.append("")
        except ReceiptInvalid as error:
            found.append(str(error))
    return found


def javascript_says(jwks: bytes, texts: list[bytes]) -> list[str]:
    assert NODE is not None, "Node 20 is needed"
    lines = b"".join(base64.b64encode(text) + b"\n" for text in [jwks, *texts])
    done = subprocess.run([NODE, "--no-warnings", JUDGE], input=lines, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().split("\n")[:-1]


def both(jwks: bytes, *texts: bytes) -> list[bool]:
    """Which are valid, to both."""
    ours, others = python_says(jwks, list(texts)), javascript_says(jwks, list(texts))
    assert len(ours) == len(others) == len(texts)
    valid = [not wrong for wrong in ours]
    said = zip(texts, ours, others, strict=True)
    differing = [(text, one, other) for text, one, other in said if bool(one) != bool(other)]
    assert differing == []
    return valid


READERS: dict[str, dict[str, str]] = {"operator": {}, "tenant": {"tenant": "proj_a"}, "owner": {"owner": "gazette"}}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_copy_is_valid_to_both_verifiers_and_with_one_flipped_byte_to_neither(
    kit: Any, text: Text, reader: dict[str, str]
) -> None:
    receipts = kit.made(1, 2, 3)
    whole, rng = text(receipts, 2, **reader), random.Random(16)
    flipped = []
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        flipped.append(bytes(changed))
    assert both(receipts.jwks, whole, whole + b"\n", *flipped) == [True, True, *(False for _ in flipped)]


def test_each_leaf_alone_is_valid_and_the_whole_is_told_from_a_copy(kit: Any, text: Text) -> None:
    receipts = kit.made(1, 2)
    whole = json.loads(text(receipts, 1))
    assert len(whole["leaves"]) == 4
    alone = [rfc8785.dumps({**whole, "leaves": [leaf]}) for leaf in whole["leaves"]]
    assert both(receipts.jwks, *alone) == [True] * 4
    keys = verify.parse_keys(receipts.jwks)
    assert verify.verify_receipt(rfc8785.dumps(whole), keys).complete
    assert not verify.verify_receipt(alone[0], keys).complete


def test_a_leaf_of_another_receipt_is_found(kit: Any, text: Text) -> None:
    receipts = kit.made(1, 2, 3)
    one, other = (json.loads(text(receipts, number, owner="gazette")) for number in (1, 2))
    moved = [
        {**one, "leaves": other["leaves"]},
        {**one, "number": other["number"]},
        {**one, "batch": other["batch"]},
        {**one, "leaves": [*one["leaves"], *other["leaves"]]},
        {**one, "leaves": []},
    ]
    assert both(receipts.jwks, *map(rfc8785.dumps, moved)) == [False] * 5


def test_json_that_readers_read_differently_is_found(kit: Any, text: Text) -> None:
    receipts = kit.made(1)
    whole = text(receipts, 1, tenant="proj_a")
    leaf = whole.index(b'"index":')
    variants = [
        whole.replace(b'"format":', b'"format":"flexgate-receipt/1","format":', 1),
        whole.replace(b'{"batch":', b'{ "batch":', 1),
        b"\xef\xbb\xbf" + whole,
        whole + b"\n\n",
        whole[:leaf] + whole[leaf:].replace(b'"index":', b'"index":0', 1),
        whole.replace(b'"number":"1"', b'"number":1', 1),
        whole.replace(b'"outcome":"completed"', b'"outcome":"\\u0063ompleted"', 1),
        whole.replace(b'"tenant":"proj_a"', b'"tenant":"\\ud800"', 1),
        whole.replace(b'"tenant":"proj_a"', b'"tenant":1e400', 1),
        whole.replace(b'"tenant":"proj_a"', b'"tenant":NaN', 1),
        b"[" * 100_000,
        b"",
        b"null",
        b"{}",
    ]
    assert all(variant != whole for variant in variants)
    assert both(receipts.jwks, *variants) == [False] * len(variants)


class Forger:
    """A server whose key is trusted, and that signs whatever it likes."""

    def __init__(self) -> None:
        self.key = Ed25519PrivateKey.generate()
        self.public = raw_public_key(self.key.public_key())
        self.jwks = rfc8785.dumps({"keys": [jwk(self.public)]})

    def receipt(self, *contents: Any, header: dict[str, str] | None = None, **changes: Any) -> bytes:
        """A receipt alone in its batch, over leaves of any content."""
        salts = [bytes([number]) * 32 for number in range(len(contents))]
        encoded = [canonical(content) for content in contents]
        hashes = [merkle.leaf_hash(salt + one) for salt, one in zip(salts, encoded, strict=True)]
        root = merkle.leaf_hash(hashlib.sha256(b"\x02" + b"".join(hashes)).digest()).hex()
        values = {"at": "1", "first": "1", "last": "1", "number": "1", "previous": "0" * 64}
        values |= {"server": f"srv_{'0' * 32}", "kid": jwk(self.public)["kid"], "root": root, **(header or {})}
        message = Header(**values).encode()
        leaves = b",".join(
            b'{"content":%b,"index":%d,"salt":"%b"}' % (one, index, salts[index].hex().encode())
            for index, one in enumerate(encoded)
        )
        batch = b'{"header":%b,"path":[],"signature":"%b"}' % (message, self.key.sign(message).hex().encode())
        known = canonical([hash_.hex() for hash_ in hashes])
        rest = b'"format":"flexgate-receipt/1","hashes":%b,"leaves":[%b],"number":"%b"' % (
            known,
            leaves,
            changes.get("number", b"1"),
        )
        return b'{"batch":%b,%b}' % (batch, rest)


def canonical(content: Any) -> bytes:
    """A leaf's content; what is bytes already is any text."""
    return content if isinstance(content, bytes) else rfc8785.dumps(content)


ID = "dec_" + "0" * 32
SHARE = {"expert": "news", "owner": "gazette", "share_ppm": 1_000_000}
FACTS = {"completion_tokens": "9", "ended_at": "5", "outcome": "completed", "prompt_tokens": "3"}
REQUEST = {**FACTS, "experts": [SHARE], "kind": "request", "receipt": ID}
PART = {"expert": "news", "share_ppm": 1_000_000}
OWNER = {**FACTS, "experts": [PART], "kind": "owner", "owner": "gazette", "receipt": ID}
EMPTY = {"kind": "none", "receipt": ID}


def test_whatever_a_trusted_server_signs_both_verifiers_judge_alike() -> None:
    forger = Forger()
    valid = [
        forger.receipt(REQUEST, OWNER),
        forger.receipt(REQUEST, OWNER, EMPTY, EMPTY),
        forger.receipt({**REQUEST, "experts": [{**SHARE, "owner": None}]}),
        forger.receipt({**REQUEST, "more": {"é😀\u2028": [True, None, -5, 2**53 - 1]}}, OWNER),
        forger.receipt({**REQUEST, "__proto__": {"x": 1}, "10": 1, "9": 2}, OWNER),
    ]
    invalid = [
        forger.receipt(REQUEST, EMPTY),  # an owner's leaf is missing
        forger.receipt(REQUEST, OWNER, OWNER, EMPTY),  # two for one owner
        forger.receipt(REQUEST, {**OWNER, "experts": []}),
        forger.receipt(REQUEST, {**OWNER, "experts": [{"expert": "news", "share_ppm": 1}]}),
        forger.receipt(REQUEST, {**OWNER, "owner": "academy"}),
        forger.receipt(REQUEST, {**OWNER, "receipt": "dec_" + "1" * 32}),
        forger.receipt(REQUEST, REQUEST),
        forger.receipt({**REQUEST, "experts": None}, OWNER),
        forger.receipt({**REQUEST, "experts": [None]}, OWNER),
        forger.receipt({**REQUEST, "kind": "other"}, OWNER),
        forger.receipt({**REQUEST, "receipt": "x"}, OWNER),
        forger.receipt(b'{"big":9007199254740992,' + canonical(REQUEST)[1:], OWNER),
        forger.receipt(b'{"big":1e+21,' + canonical(REQUEST)[1:], OWNER),
        forger.receipt(b'{"big":0.5,' + canonical(REQUEST)[1:], OWNER),
        forger.receipt(b'{"big":-0,' + canonical(REQUEST)[1:], OWNER),
        forger.receipt(b'{"a":"\\ud800",' + canonical(REQUEST)[1:], OWNER),
        forger.receipt(b'{"a":1,"a":1,' + canonical(REQUEST)[1:], OWNER),
        forger.receipt(b'{"a":' + b"[" * 9 + b"]" * 9 + b"," + canonical(REQUEST)[1:], OWNER),
        forger.receipt(b"[]"),
        forger.receipt(b""),
        forger.receipt(REQUEST, OWNER, number=b"2"),
        forger.receipt(REQUEST, OWNER, number=b"0"),
        forger.receipt(REQUEST, OWNER, header={"last": "2"}),
        forger.receipt(REQUEST, OWNER, header={"first": "2"}),
        forger.receipt(REQUEST, OWNER, header={"last": "70000"}),
        forger.receipt(REQUEST, OWNER, header={"root": "0" * 64}),
        forger.receipt(REQUEST, OWNER, header={"server": "srv"}),
        forger.receipt(REQUEST, OWNER, header={"at": "01"}),
        forger.receipt(REQUEST, OWNER, header={"format": "flexgate-receipt-batch/2"}),
        Forger().receipt(REQUEST, OWNER),
    ]
    assert both(forger.jwks, *valid, *invalid) == [True] * len(valid) + [False] * len(invalid)


@pytest.mark.parametrize("fact", FACTS)
def test_an_owner_is_told_what_the_tenant_is_told(fact: str) -> None:
    forger = Forger()
    lies = [forger.receipt(REQUEST, {**OWNER, fact: "8"}), forger.receipt({**REQUEST, fact: None}, OWNER)]
    assert both(forger.jwks, forger.receipt(REQUEST, OWNER), *lies) == [True, False, False]


def test_shares_sum_to_a_million_or_nothing() -> None:
    forger = Forger()
    halves = [{**SHARE, "share_ppm": 500_000}, {"expert": "public", "owner": None, "share_ppm": 500_000}]
    half = {**OWNER, "experts": [{**PART, "share_ppm": 500_000}]}
    none = {**SHARE, "share_ppm": 0}
    valid = [
        forger.receipt({**REQUEST, "experts": halves}, half),
        forger.receipt({**REQUEST, "experts": [none]}, {**OWNER, "experts": [{**PART, "share_ppm": 0}]}),
        forger.receipt({**REQUEST, "experts": []}),
        shown(forger.receipt(half, EMPTY), 0),
    ]
    wrong = [True, "1000000", None, -1, 999_999, 1_000_001, [1_000_000]]
    invalid = [
        *(forger.receipt({**REQUEST, "experts": [{**SHARE, "share_ppm": one}]}, EMPTY) for one in wrong),
        *(
            forger.receipt({**REQUEST, "experts": [SHARE, {**none, "owner": None, "share_ppm": one}]})
            for one in (1, -1)
        ),
        forger.receipt({**REQUEST, "experts": halves[:1]}, half),
        forger.receipt({**OWNER, "experts": [PART, {**PART, "share_ppm": 1}]}),
        forger.receipt({**OWNER, "owner": None}),
        forger.receipt(REQUEST, OWNER, {**OWNER, "owner": "academy", "experts": []}),
    ]
    alone = []
    for receipt in invalid[: len(wrong)]:  # the tenant's copy
        value = json.loads(receipt)
        alone.append(rfc8785.dumps({**value, "leaves": value["leaves"][:1]}))
    checked = both(forger.jwks, *valid, *invalid, *alone)
    assert checked == [True] * len(valid) + [False] * (len(invalid) + len(alone))


def test_what_was_left_out_took_no_part_and_has_a_grade() -> None:
    forger = Forger()
    math, poems = {"expert": "math", "grade": "router"}, {"expert": "poems", "grade": "unknown", "more": 1}
    hidden = {"excluded": [poems], "kind": "hidden", "receipt": ID}
    used = {"expert": "news", "grade": "removed"}
    valid = [
        forger.receipt({**REQUEST, "excluded": [math]}, OWNER),
        forger.receipt({**REQUEST, "excluded": [math, poems]}, OWNER, {**hidden, "excluded": []}),
        forger.receipt({**REQUEST, "excluded": []}, OWNER, hidden),
        forger.receipt(REQUEST, OWNER, {"kind": "hidden", "receipt": ID}),
        shown(forger.receipt({**REQUEST, "excluded": [math]}, OWNER, hidden), 2),
    ]
    invalid = [
        forger.receipt({**REQUEST, "excluded": [used]}, OWNER),
        forger.receipt(REQUEST, OWNER, {**hidden, "excluded": [used]}),
        shown(forger.receipt(REQUEST, OWNER, {**hidden, "excluded": [used]}), 1, 2),
        forger.receipt({**REQUEST, "excluded": [math, math]}, OWNER),
        forger.receipt({**REQUEST, "excluded": [poems]}, OWNER, hidden),
        forger.receipt(REQUEST, OWNER, hidden, {**hidden, "excluded": [math]}),
        *(
            forger.receipt({**REQUEST, "excluded": wrong}, OWNER)
            for wrong in (None, "math", [None], ["math"], [[]], [{}], [{"expert": "math"}], [{"grade": "router"}])
        ),
        forger.receipt({**REQUEST, "excluded": [{**math, "grade": "none"}]}, OWNER),
        forger.receipt({**REQUEST, "excluded": [{**math, "expert": ["news"]}]}, OWNER),
        forger.receipt({**REQUEST, "excluded": [{**math, "expert": ""}]}, OWNER),
        forger.receipt(REQUEST, OWNER, {**hidden, "excluded": None}),
    ]
    assert both(forger.jwks, *valid, *invalid) == [True] * len(valid) + [False] * len(invalid)


def test_the_first_batch_begins_a_history() -> None:
    forger, one = Forger(), "1" * 64
    first_ones = [{"previous": one}, {"first": "5", "last": "5"}, {"first": "1", "number": "2", "previous": one}]
    receipts = [
        forger.receipt(REQUEST, OWNER, header=header, number=header.get("first", "1").encode()) for header in first_ones
    ]
    later = forger.receipt(
        REQUEST, OWNER, header={"first": "2", "last": "2", "number": "2", "previous": one}, number=b"2"
    )
    assert both(forger.jwks, later, *receipts) == [True, False, False, False]


def shown(receipt: bytes, *indices: int) -> bytes:
    """A copy that shows these leaves alone."""
    value = json.loads(receipt)
    return rfc8785.dumps({**value, "leaves": [value["leaves"][index] for index in indices]})


def verify_together(found: list[verify.Verified]) -> None:
    verify.verify_order([one.batch for one in found])
    verify.verify_copies(found)


def test_copies_that_tell_two_histories_are_valid_alone_and_not_together() -> None:
    forger = Forger()
    later = {"first": "2", "last": "2", "number": "2", "previous": "1" * 64}
    again = forger.receipt(REQUEST, OWNER, header=later, number=b"2")
    one = forger.receipt(REQUEST, OWNER, EMPTY, EMPTY)
    lie = forger.receipt(REQUEST, {**OWNER, "completion_tokens": "8"}, EMPTY, EMPTY)
    other = forger.receipt({**REQUEST, "receipt": "dec_" + "1" * 32}, {**OWNER, "receipt": "dec_" + "1" * 32})
    tenant, owner = shown(one, 0), shown(one, 1)
    pairs = {
        "copies of one receipt": (tenant, owner, one, one),
        "two numbers": (tenant, shown(again, 1)),
        "an owner told another figure": (shown(lie, 0), shown(lie, 1)),
        "a fork": (tenant, other),
        "two leaves of an owner": (
            shown(forger.receipt(REQUEST, OWNER, OWNER, EMPTY), 1),
            shown(forger.receipt(REQUEST, OWNER, OWNER, EMPTY), 2),
        ),
        "another server's": (tenant, shown(forger.receipt(REQUEST, OWNER, header={"server": f"srv_{'1' * 32}"}), 1)),
    }
    keys = verify.parse_keys(forger.jwks)
    for name, texts in pairs.items():
        assert both(forger.jwks, *texts) == [True] * len(texts), name
        together = javascript_says(forger.jwks, [b"\n".join(texts)])
        fits = name == "copies of one receipt"
        assert (together == [""]) == fits, (name, together)
        found = [verify.verify_receipt(text, keys) for text in texts]
        if fits:
            verify_together(found)
        else:
            with pytest.raises(ReceiptInvalid):
                verify_together(found)


def test_what_is_no_leaf_passes_for_none() -> None:
    """Second preimages: a list of hashes that is cut, longer or in another order, and a leaf in another's place."""
    forger = Forger()
    value = json.loads(forger.receipt(REQUEST, OWNER, EMPTY, EMPTY))
    hashes, (one, other, *_) = value["hashes"], value["leaves"]
    changed = [
        {**value, "hashes": hashes[:2], "leaves": [one, other]},
        {**value, "hashes": [*hashes, hashes[0]]},
        {**value, "hashes": hashes[::-1]},
        {**value, "hashes": ["".join(hashes[:2]), *hashes[2:]], "leaves": [{**one, "index": 0}]},
        {**value, "leaves": [{**one, "index": 1}]},
        {**value, "leaves": [one, one]},
        {**value, "leaves": [other, one]},
        {**value, "leaves": [{**one, "index": -1}]},
        {**value, "leaves": [{**one, "index": 4}]},
        {**value, "leaves": [{**one, "salt": other["salt"]}]},
    ]
    assert both(forger.jwks, *map(rfc8785.dumps, changed)) == [False] * len(changed)


KEY_SETS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another curve": lambda key: {**key, "crv": "X25519"},
    "another algorithm": lambda key: {**key, "alg": "ES256"},
    "another key's id": lambda key: {**key, "kid": "A" * 43},
    "bits that say nothing": lambda key: {**key, "x": key["x"][:-1] + chr(ord(key["x"][-1]) + 1)},
    "a private key": lambda key: {**key, "d": key["x"]},
    "no key": lambda key: {},
    "a short key": lambda key: {**key, "x": key["x"][:-3]},
    "padding": lambda key: {**key, "x": key["x"] + "="},
}


@pytest.mark.parametrize("change", KEY_SETS.values(), ids=KEY_SETS)
def test_a_key_set_that_says_something_else_verifies_nothing(change: Callable[[dict[str, Any]], Any]) -> None:
    forger = Forger()
    key = jwk(forger.public)
    assert both(rfc8785.dumps({"keys": [change(key)]}), forger.receipt(REQUEST, OWNER)) == [False]


def test_a_key_set_with_a_key_twice_or_with_none_verifies_nothing() -> None:
    forger = Forger()
    key, receipt = jwk(forger.public), forger.receipt(REQUEST, OWNER)
    other = jwk(raw_public_key(Ed25519PrivateKey.generate().public_key()))
    assert both(rfc8785.dumps({"keys": [other, key]}), receipt) == [True]
    for keys in ([key, key], [other], []):
        assert both(rfc8785.dumps({"keys": keys}), receipt) == [False]
    assert both(json.dumps({"keys": [key]}).encode(), receipt) == [False]


def test_the_other_verifier_is_short_and_needs_nothing() -> None:
    source = (Path(__file__).parents[4] / "docs/examples/verify-receipt.mjs").read_text()
    assert len(source.splitlines()) <= 150
    assert [line for line in source.splitlines() if line.startswith("import ")] == []
