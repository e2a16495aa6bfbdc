"""What all owners' parts sum to is what all requests used."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection
from contextlib import closing
from typing import Any

import pytest
import rfc8785

from flexgate.policies.agreements import Agreement
from flexgate.server.ledger.entries import RegisteredExpert
from flexgate.server.ledger.receipts import verify
from flexgate.server.ledger.receipts.canonical import ReceiptInvalid
from flexgate.server.ledger.receipts.owners import sums_of_owners
from flexgate.server.ledger.receipts.service import Receipts
from flexgate.server.ledger.receipts.statements import Statements
from flexgate.server.ledger.receipts.verify_owners import OwnersSums, verify_owners, verify_parts
from flexgate.server.ledger.receipts.verify_statement import SignedStatement, verify_statement
from flexgate.server.ledger.statements import Period
from flexgate.server.ledger.terms import Terms, Version

MONTH = Period.of("1970-01")
DUTIES = [{"kind": "compensate", "rate": "0.3", "currency": "EUR", "unit": "request"}]


def terms_of(counted: Collection[Terms]) -> dict[Version, Agreement]:
    fields = {"owner": "x", "experts": ["x"], "assignee": "everyone", "effect": "permit", "duties": DUTIES}
    return {
        (id_, number): Agreement.model_validate({**fields, "id": id_, "version": number})
        for (id_, number), _ in counted
    }


def made(kit: Any) -> Receipts:
    """Requests with both owners' experts, with one owner's, and with none that was routed to."""
    kit.record(1, 2)
    kit.record(3, experts=(RegisteredExpert(0, "public", None), RegisteredExpert(3, "math", "academy", "a-math", 2)))
    kit.record(4, experts=())
    maker = kit.maker()
    maker.work()
    return kit.receipts(maker)


def sums(receipts: Receipts) -> bytes:
    return rfc8785.dumps(sums_of_owners(receipts, MONTH, terms_of, at=9e6, ended=True))


def statement(receipts: Receipts, owner: str) -> SignedStatement:
    text = rfc8785.dumps(Statements(receipts).sign(owner, MONTH, terms_of, at=9e6, ended=True))
    return verify_statement(text, verify.parse_keys(receipts.jwks))


def verified(receipts: Receipts, text: bytes) -> OwnersSums:
    return verify_owners(text, verify.parse_keys(receipts.jwks))


def test_all_parts_sum_to_what_all_requests_used_and_are_what_statements_say(kit: Any) -> None:
    receipts = made(kit)
    found = verified(receipts, sums(receipts))
    assert (list(found.parts), found.provisional) == ([None, "academy", "gazette"], False)
    assert {owner: part["EUR"] * 10 for owner, part in found.parts.items() if owner} == {"gazette": 12, "academy": 9}
    said = json.loads(sums(receipts))["owners"]
    assert (said["requests"], said["tokens"], said["unrouted_tokens"]) == ("4", "52", "13")
    assert int(said["uses"]["share_weighted_ppm"]) == (52 - 13) * 1_000_000
    assert verify_parts([found], [statement(receipts, owner) for owner in ("gazette", "academy")]) == 2


def test_parts_that_do_not_sum_are_found_by_an_auditor(kit: Any) -> None:
    """Whatever is signed: a part that was left out, or is more than the requests used."""
    receipts = made(kit)
    whole = json.loads(sums(receipts))["owners"]

    def signed(**changes: Any) -> bytes:
        said = {**whole, **changes}
        return rfc8785.dumps({"owners": said, "signature": kit.key.sign(rfc8785.dumps(said)).hex()})

    uses, parts = whole["uses"], whole["parts"]
    wrong = {
        "owners' shares sum to": signed(tokens="53"),
        "do not have the sums": signed(uses={**uses, "tokens": "1"}),
        "'uses'": signed(uses={}),
        "do not have the sums that": signed(amounts=[{"amount": "1", "currency": "EUR"}]),
        "do not have the sums that were": signed(parts=parts[:-1]),
        "an owner has two parts, or": signed(parts=[*parts, parts[-1]]),
        "an owner has two parts, or no name": signed(parts=[{**parts[0], "owner": ["x"]}, *parts[1:]]),
        "'parts' must be a list": signed(parts=None),
        "'amounts' must be a list": signed(parts=[{**parts[0], "amounts": None}, *parts[1:]]),
    }
    for message, text in wrong.items():
        with pytest.raises(ReceiptInvalid, match=message):
            verified(receipts, text)
    euros = [{"amount": "1", "currency": "EUR"}, *whole["amounts"]]
    with pytest.raises(ReceiptInvalid, match="two amounts in EUR"):
        verified(receipts, signed(amounts=euros))
    with pytest.raises(ReceiptInvalid, match="two contents of the sums"):
        verify_parts([verified(receipts, one) for one in (sums(receipts), signed(requests="5"))], [])
    changed = sums(receipts).replace(b'"owner":"gazette"', b'"owner":"academy"', 1)
    with pytest.raises(ReceiptInvalid, match="its signature is wrong"):
        verified(receipts, changed)


def test_a_statement_that_is_not_its_owners_part_is_found(kit: Any) -> None:
    receipts = made(kit)
    before = statement(receipts, "gazette")
    with closing(sqlite3.connect(kit.ledger)) as connection, connection:
        numbers = dict(connection.execute("SELECT expert, number FROM experts"))
        connection.execute("DELETE FROM counts WHERE sequence = 2 AND number = ?", (numbers["news"],))
        connection.execute(
            "UPDATE counts SET share_ppm = 1000000 * (number = ?) WHERE sequence = 2", (numbers["public"],)
        )
    with pytest.raises(ReceiptInvalid, match="is not that owner's part"):
        verify_parts([verified(receipts, sums(receipts))], [before])


def test_final_sums_are_the_same_whenever_they_are_made(kit: Any) -> None:
    receipts = made(kit)
    first = sums(receipts)
    kit.record(5)
    with closing(sqlite3.connect(kit.ledger)) as connection, connection:
        connection.execute(
            "UPDATE usage SET ended_at = ended_at + 3000000000000 WHERE sequence = 5"
        )  # of another month
    receipts.maker.work()
    both = [verified(receipts, one) for one in (first, sums(receipts))]
    assert [(one.last, one.provisional) for one in both] == [(4, False), (5, False)]
    assert both[0].parts == both[1].parts
    assert verify_parts(both, [statement(receipts, "gazette")]) == 2
