"""A holder of receipts finds a signed statement that leaves one out, adds one, or has other figures."""

from __future__ import annotations

import json
import random
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from statementkit import (
    CORRECTION,
    both,
    page,
    proof,
    python_says,
    resigned,
    signed,
)

from flexgate.server.ledger.receipts import merkle, verify
from flexgate.server.ledger.receipts.service import NoReceipt
from flexgate.server.ledger.receipts.verify_statement import verify_statement, verify_statements


def change(kit: Any, statement: str) -> None:
    with closing(sqlite3.connect(kit.ledger)) as connection, connection:
        connection.execute(statement)


def test_a_statement_says_what_its_receipts_say(kit: Any, name: Callable[[int], str]) -> None:
    receipts = kit.made(1, 2, 3)
    statement, mine = signed(receipts), page(receipts)
    said = json.loads(statement)["statement"]
    assert (said["provisional"], said["receipts"], said["last"]) == (False, "3", "3")
    assert [(line["expert"], line["requests"], line["tokens"]) for line in said["lines"]] == [
        ("news", "3", "39"),
        ("sports", "3", "12"),
    ]
    assert [one["currency"] for one in said["totals"]] == ["EUR", "JPY"]
    assert python_says(receipts.jwks, (statement, *mine)) == ""
    found = verify_statements(
        [verify_statement(statement, verify.parse_keys(receipts.jwks))],
        [verify.verify_receipt(one, verify.parse_keys(receipts.jwks)) for one in mine],
        [],
    )
    assert found == ["it counts the 3 receipts that were given, and no others; its figures are theirs"]
    some = (statement, mine[1], proof(receipts, name(2)))
    assert both(receipts.jwks, (statement, *mine), (statement, *mine[::-1]), some, (statement,)) == [True] * 4


def test_one_flipped_byte_of_a_statement_is_found(kit: Any) -> None:
    receipts = kit.made(1)
    whole, rng = signed(receipts), random.Random(16)
    flipped = []
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        flipped.append((bytes(changed),))
    assert both(receipts.jwks, (whole,), *(one for one in flipped if b"\n" not in one[0])) == [
        True,
        *(False for one in flipped if b"\n" not in one[0]),
    ]


def test_a_receipt_that_is_left_out_is_found_by_its_holder(kit: Any, name: Callable[[int], str]) -> None:
    receipts = kit.made(1, 2, 3)
    mine, before = page(receipts), proof(receipts, name(2))
    change(kit, "DELETE FROM counts WHERE sequence = 2")
    without = signed(receipts)
    assert json.loads(without)["statement"]["receipts"] == "2"
    kept = proof(receipts, name(3))
    forged = kept.replace(name(3).encode(), name(2).encode())
    bundles = [
        (without, *mine),
        (without, mine[1]),
        (without, mine[1], before),
        (without, mine[1], kept),
        (without, mine[1], forged),
    ]
    assert both(receipts.jwks, (without, mine[0], mine[2]), *bundles) == [True, *(False for _ in bundles)]
    assert "leaves out receipts" in python_says(receipts.jwks, (without, *mine))
    assert "the receipt was left out" in python_says(receipts.jwks, (without, mine[1]))
    with pytest.raises(NoReceipt):  # it has no path to show
        proof(receipts, name(2))


def test_a_receipt_that_is_added_is_found_by_who_has_all(kit: Any) -> None:
    receipts = kit.made(1, 2, 3)
    first, whole = page(receipts), signed(receipts)
    change(kit, "UPDATE usage SET ended_at = ended_at + 3000000000000 WHERE sequence = 2")  # of another month
    honest = signed(receipts)
    change(kit, "UPDATE usage SET ended_at = ended_at - 3000000000000 WHERE sequence = 2")
    change(kit, "DELETE FROM counts WHERE sequence = 1")
    other = signed(receipts)  # 2 stands for 1
    two = first[0], first[2]
    assert both(receipts.jwks, (honest, *two), (other, *two), (whole, *two)) == [True, False, False]
    assert "counts other receipts" in python_says(receipts.jwks, (other, *two))


def test_figures_that_are_not_those_of_the_receipts_are_found(kit: Any) -> None:
    receipts = kit.made(1, 2, 3)
    mine, honest = page(receipts), signed(receipts)
    whole = json.loads(honest)["statement"]
    news, sports = whole["lines"]
    none = {**sports, "compensate": [], "amount": None, "currency": None}
    euros = whole["totals"][:1]
    fewer = {**sports, "requests": "2"}  # of no rate
    alone = [
        {"lines": [{**news, "amount": "0.1"}, sports]},
        {"lines": [{**news, "amount": None}, sports]},
        {"lines": [{**news, "currency": "JPY"}, sports]},
        {"lines": [news, {**sports, "tokens": "13"}]},
        {"lines": [news, sports, sports]},
        {"lines": [news, {**sports, "compensate": [{"rate": "0.1", "unit": "day"}]}]},
        {"lines": [{**news, "expert": None}, sports]},
        {"lines": "none"},
        {"totals": euros},
        {"totals": [{**euros[0], "amount": str(round(float(euros[0]["amount"])))}, *whole["totals"][1:]]},
        {"totals": [*euros, {"amount": "1", "currency": "JPY"}]},
        {"totals": [*euros, *euros]},
        {"corrections": None},
        {"corrections": [CORRECTION]},  # the total is without it
        {"corrections": [{**CORRECTION, "amount": "0"}, {**CORRECTION, "amount": "0"}]},
        {"corrections": [{**CORRECTION, "amount": "0", "at": "2678400000000"}]},
        {"end": "2678400000001"},
        {"period": "1970-02"},
        {"period": "1970"},
        {"provisional": "no"},
        {"root": "0" * 63},
        {"format": "flexgate-statement/2"},
        {"head": {"hash": "0" * 64}},
        {"server": "srv_1"},
    ]
    with_all = [
        {"lines": [news, fewer]},
        {"lines": [news], "totals": euros},
        {"lines": [news, none], "totals": euros},
        {"root": "0" * 64},
        {"receipts": "2"},
        {"receipts": "4"},
        {"lines": [news, {**none, "tokens": "13"}], "totals": euros},
    ]
    bundles = [(resigned(kit, honest, **one),) for one in alone]
    bundles += [(resigned(kit, honest, **one), *mine) for one in with_all]
    valid = both(receipts.jwks, (resigned(kit, honest, more={"x": [1]}), *mine), *bundles)
    judged = dict(zip(["honest", *map(str, alone), *map(str, with_all)], valid, strict=True))
    assert judged == {**dict.fromkeys(judged, False), "honest": True, str(with_all[2]): True}  # whose rates are its own


def test_figures_are_at_least_those_of_the_receipts_that_were_given(kit: Any, name: Callable[[int], str]) -> None:
    """Also where the tree has one leaf more than there are receipts, so that nobody has all."""
    receipts = kit.made(1, 2, 3)
    mine, honest = page(receipts), signed(receipts)
    news, sports = json.loads(honest)["statement"]["lines"]
    none = {**sports, "compensate": [], "amount": None, "currency": None}
    euros = json.loads(honest)["statement"]["totals"][:1]
    keys = verify.parse_keys(receipts.jwks)
    leaves = [merkle.leaf_hash(verify.verify_receipt(one, keys).root) for one in mine]

    def with_places(*hashes: bytes, **changes: Any) -> tuple[bytes, ...]:
        """A statement over other leaves, all receipts but those that it has not, and their paths."""
        levels = merkle.levels(hashes)
        root, size = merkle.root_of(levels).hex(), str(len(hashes))
        said = {"receipts": size, "root": root}
        paths = []
        for number, leaf in enumerate(leaves, start=1):
            path = [one.hex() for one in merkle.path(levels, hashes.index(leaf))]
            shown = json.loads(proof(receipts, name(number)))
            paths.append(rfc8785.dumps({**shown, **said, "index": str(hashes.index(leaf)), "path": path}))
        return (resigned(kit, honest, **said, **changes), *mine, *paths)

    more = (*leaves, b"0" * 32)
    fewer = [
        {"lines": [], "totals": []},
        {"lines": [news], "totals": euros},
        {"lines": [news, {**none, "requests": "2"}], "totals": euros},
        {"lines": [news, {**none, "requests": "5"}], "totals": euros},
        {"lines": [news, {**none, "requests": "4", "tokens": "11"}], "totals": euros},
        {"lines": [news, {**none, "tokens": "13"}], "totals": euros},
        {"lines": [news, none, {**none, "expert": "other", "requests": "0"}], "totals": euros},
    ]
    assert both(
        receipts.jwks,
        with_places(*more),
        with_places(*more, lines=[news, {**none, "requests": "4", "tokens": "99"}], totals=euros),
        with_places(leaves[1], leaves[0], *more[2:]),
        *(with_places(*more, **one) for one in fewer),
    ) == [True, True, False, *(False for _ in fewer)]
    assert "has other figures" in python_says(receipts.jwks, with_places(*more, **fewer[0]))


def test_two_contents_of_one_final_statement_contradict_each_other(kit: Any) -> None:
    receipts = kit.made(1, 2)
    honest = signed(receipts)
    kit.record(3)  # in the same month: the first one was not final
    receipts.maker.work()
    later = signed(receipts)
    again, open_ = signed(receipts, at=9.5e6), signed(receipts, ended=False)
    assert both(receipts.jwks, (honest, later), (later, again), (later, open_)) == [False, True, True]


def test_a_receipt_is_counted_though_its_statement_is_of_another_server_or_moment(kit: Any) -> None:
    receipts = kit.made(1, 2)
    kit.record(3)
    receipts.maker.work()
    mine, honest = page(receipts), signed(receipts)
    none = {"lines": [], "totals": [], "receipts": "0", "root": merkle.EMPTY.hex()}
    elsewhere = resigned(kit, honest, server=f"srv_{'1' * 32}", **none)
    assert "which does not count it" in python_says(receipts.jwks, (elsewhere, *mine))
    assert both(receipts.jwks, (elsewhere, *mine), (honest, elsewhere, *mine), (elsewhere,)) == [False, True, True]
    head, early = {"hash": "1" * 64, "number": "2"}, {"provisional": True, **none}
    wrong = {
        "ends in two ways": {"last": "0", **early},
        "ends in two ways with batch 2": {"head": head},
        "and an earlier one with receipt 3": {"head": {**head, "number": "5"}, "last": "2"},
    }
    bundles = [(resigned(kit, honest, **changes), *mine) for changes in wrong.values()]
    later = resigned(kit, honest, head={**head, "number": "5"}, last="9")
    assert both(receipts.jwks, (later, *mine), *bundles) == [True, *(False for _ in bundles)]
    for message, bundle in zip(wrong, bundles, strict=True):
        assert message in python_says(receipts.jwks, bundle)
    assert both(receipts.jwks, (honest, resigned(kit, honest, head=head))) == [False]


def test_the_other_verifier_is_short_and_needs_nothing_but_the_first() -> None:
    examples = Path(__file__).parents[4] / "docs" / "examples"
    found = {}
    for name in ("verify-statement.mjs", "verify-history.mjs"):
        source = (examples / name).read_text()
        assert len(source.splitlines()) <= 150
        found[name] = re.findall(r'(?:from |import\()"(.*?)"', source)
    assert found == {
        "verify-statement.mjs": ["./verify-history.mjs", "./verify-receipt.mjs", "node:fs"],
        "verify-history.mjs": ["./verify-receipt.mjs"],
    }
