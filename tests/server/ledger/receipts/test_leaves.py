"""A copy shows its reader's leaves, and tells nothing of the others."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from flexgate.server.ledger.entries import RegisteredExpert, Registration, encode_registration
from flexgate.server.ledger.exclusion import catalogue_of
from flexgate.server.ledger.receipts import rows as ledger_rows
from flexgate.server.ledger.receipts import verify
from flexgate.server.ledger.receipts.batches import Header
from flexgate.server.ledger.receipts.leaves import Names, Recorded, grow
from flexgate.server.ledger.receipts.merkle import leaf_hash
from flexgate.server.ledger.receipts.service import NoReceipt, Reader, ReceiptDamaged, ReceiptPending

Text = Callable[..., bytes]
OTHERS = ("academy", "math", "proj_a", "key_a", "a-math", "c" * 64)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.integers(0, 2**63 - 1)


@given(words, words, words, numbers, numbers, st.lists(st.tuples(words, words, numbers), max_size=4))
def test_leaves_are_canonical_json(
    tenant: str, model: str, outcome: str, tokens: int, mass: int, parts: list[tuple[str, str, int]]
) -> None:
    usage = (1, "dec_1", 2, 3, outcome, tenant, "key", "/v1", model, 7, 3, tokens, tokens, tokens, "0" * 64, None)
    usage += catalogue_of(((tenant, "router"), (model, "removed"), (outcome, "unknown"))), "120"
    rows = [(Names(owner, expert, None, owner, version), (mass, 1, 2, 3, 5)) for owner, expert, version in parts]
    grown = grow(Recorded(usage, rows), secret=bytes(32), policy_digest=None, pseudonym=lambda o, t: f"{o}/{t}")
    for _, (_, _, content) in grown.leaves:
        assert content == rfc8785.dumps(json.loads(content))


def test_a_header_is_canonical_json() -> None:
    names = ("at", "first", "kid", "last", "number", "previous", "root", "server")
    header = Header(**{name: name for name in names}).encode()
    assert header == rfc8785.dumps(json.loads(header))


def test_an_owners_copy_shows_its_leaf_and_nothing_of_others(kit: Any, text: Text) -> None:
    shown = text(kit.made(1, 2), 1, owner="gazette")
    (leaf,) = json.loads(shown)["leaves"]
    assert leaf["content"]["owner"] == "gazette"
    assert [expert["expert"] for expert in leaf["content"]["experts"]] == ["news", "sports"]
    news = leaf["content"]["experts"][0]
    assert (news["agreement"], news["agreement_version"], news["package"]) == ("a-news", "3", "b" * 64)
    assert [other for other in OTHERS if other.encode() in shown] == []
    assert b'"opening"' not in shown


def test_owners_know_a_tenant_by_different_names(kit: Any, text: Text) -> None:
    receipts = kit.made(1, 2)

    def named(number: int, owner: str) -> str:
        return str(json.loads(text(receipts, number, owner=owner))["leaves"][0]["content"]["tenant"])

    assert named(1, "gazette") == named(2, "gazette") != named(1, "academy")


def test_a_tenants_copy_names_no_expert_outside_its_gate(kit: Any, text: Text) -> None:
    receipts = kit.made(1, experts=(RegisteredExpert(0, "public", None), RegisteredExpert(1, "news", "gazette")))
    shown = text(receipts, 1, tenant="proj_a")
    (leaf,) = json.loads(shown)["leaves"]
    assert leaf["content"]["kind"] == "request"
    assert [share["expert"] for share in leaf["content"]["experts"]] == ["public", "news"]
    assert b"math" not in shown


def left_out(shown: bytes) -> dict[str, dict[str, str]]:
    """By the kind of leaf that a copy shows, what it says was left out, with the grades."""
    leaves = [leaf["content"] for leaf in json.loads(shown)["leaves"]]
    return {
        leaf["kind"]: {one["expert"]: one["grade"] for one in leaf["excluded"]}
        for leaf in leaves
        if leaf["kind"] in ("request", "hidden")
    }


def test_a_receipt_has_what_was_left_out_and_names_to_each_reader_what_it_may_see(kit: Any, text: Text) -> None:
    receipts = kit.made(1, experts=kit.experts[:2])
    listed, hidden = {"poems": "router"}, {"sports": "shared", "math": "removed", "vault": "unknown"}
    assert left_out(text(receipts, 1)) == {"request": listed, "hidden": hidden}
    assert left_out(text(receipts, 1, tenant="proj_a")) == {"request": listed}
    assert [one for one in hidden if f'"{one}"'.encode() in text(receipts, 1, tenant="proj_a")] == []
    owners = text(receipts, 1, owner="gazette")
    assert [one for one in (*listed, *hidden) if f'"{one}"'.encode() in owners] == []


def test_the_number_of_leaves_does_not_tell_whether_something_is_hidden(kit: Any, text: Text) -> None:
    """The leaves of three owners and of the request are four, and the one of what is hidden makes them eight."""
    experts = (*kit.experts[:2], kit.experts[3], RegisteredExpert(2, "art", "museum"))
    kit.record(1, experts=experts, grades=tuple((one.expert, "removed") for one in experts))
    kit.record(2, experts=experts, grades=(*kit.grades, ("art", "removed")))
    maker = kit.maker()
    maker.work()
    shown = [text(kit.receipts(maker), number, tenant="proj_a") for number in (1, 2)]
    assert [len(json.loads(one)["hashes"]) for one in shown] == [8, 8]


def test_a_request_that_was_recorded_without_what_was_left_out_has_the_receipt_of_then(kit: Any, text: Text) -> None:
    kit.record(1)
    with closing(sqlite3.connect(kit.ledger)) as connection, connection:
        connection.execute("UPDATE usage SET catalogue = NULL, excluded = NULL")
    maker = kit.maker()
    maker.work()
    whole = text(kit.receipts(maker), 1)
    leaves = {leaf["content"]["kind"]: leaf["content"] for leaf in json.loads(whole)["leaves"]}
    assert sorted(leaves) == ["none", "owner", "request"]
    assert "excluded" not in leaves["request"]
    assert verify.verify_receipt(whole, verify.parse_keys(maker.jwks)).complete


def test_a_catalogue_is_kept_once_for_all_requests_that_it_was_of(kit: Any) -> None:
    kit.record(1, 2)
    kit.record(3, grades=kit.grades[:4])
    with closing(sqlite3.connect(kit.ledger)) as connection:
        rows = connection.execute("SELECT sequence, catalogue, excluded FROM usage ORDER BY sequence").fetchall()
        kept = connection.execute("SELECT number, experts FROM catalogues ORDER BY number").fetchall()
    assert rows == [(1, 1, "000012"), (2, 1, "000012"), (3, 2, "0000")]
    assert kept == [(1, catalogue_of(kit.grades)), (2, catalogue_of(kit.grades[:4]))]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE usage SET excluded = '000010'",
        "UPDATE usage SET excluded = '0000'",
        "UPDATE usage SET excluded = NULL",
        "UPDATE usage SET catalogue = NULL",
        "UPDATE catalogues SET experts = replace(experts, 'unknown', 'removed')",
    ],
)
def test_what_was_left_out_cannot_be_changed_afterwards(kit: Any, text: Text, change: str) -> None:
    receipts = kit.made(1)
    with closing(sqlite3.connect(kit.ledger)) as connection, connection:
        connection.execute(change)
    with pytest.raises(ReceiptDamaged):
        text(receipts, 1)


def test_shares_are_those_of_the_ledger_and_sum_to_a_million(kit: Any, text: Text) -> None:
    receipts = kit.made(1)
    whole = json.loads(text(receipts, 1))
    (request,) = (leaf["content"] for leaf in whole["leaves"] if leaf["content"]["kind"] == "request")
    assert sum(share["share_ppm"] for share in request["experts"]) == 1_000_000
    owned = [leaf["content"] for leaf in whole["leaves"] if leaf["content"]["kind"] == "owner"]
    assert {leaf["owner"]: len(leaf["experts"]) for leaf in owned} == {"academy": 1, "gazette": 2}


def test_how_many_owners_took_part_is_not_told_by_the_hashes(kit: Any, text: Text) -> None:
    few = (RegisteredExpert(1, "news", "gazette"),)
    receipts = kit.made(1)
    kit.record(2, experts=few)
    receipts.maker.work()
    sizes = [len(json.loads(text(receipts, number, owner="gazette"))["hashes"]) for number in (1, 2)]
    assert sizes == [4, 4]


def test_places_and_salts_of_leaves_differ_from_receipt_to_receipt(kit: Any, text: Text) -> None:
    receipts = kit.made(*range(1, 40))
    leaves = [json.loads(text(receipts, number, owner="gazette"))["leaves"][0] for number in range(1, 40)]
    assert len({leaf["salt"] for leaf in leaves}) == 39
    assert {leaf["index"] for leaf in leaves} == {0, 1, 2, 3}


def test_a_salt_and_an_opening_are_not_made_of_what_a_holder_knows(kit: Any, text: Text) -> None:
    """The leaf of another owner cannot be guessed: its salt is unknown, though all of its content may be known."""
    receipts = kit.made(1)
    whole, mine = json.loads(text(receipts, 1)), json.loads(text(receipts, 1, owner="gazette"))
    (others,) = (leaf for leaf in whole["leaves"] if leaf["content"].get("owner") == "academy")
    guess = leaf_hash(bytes.fromhex(mine["leaves"][0]["salt"]) + rfc8785.dumps(others["content"])).hex()
    hashes = {leaf_hash(bytes.fromhex(x["salt"]) + rfc8785.dumps(x["content"])).hex() for x in whole["leaves"]}
    assert guess not in hashes
    assert others["salt"] not in json.dumps(mine)


def test_servers_salt_the_same_row_differently(make_kit: Callable[[str], Any], text: Text) -> None:
    """What a holder knows of a request makes no salt: each server has a secret of its own."""
    shown = []
    for name in ("one", "other"):
        receipt = json.loads(text(make_kit(name).made(1), 1, tenant="proj_a"))
        shown.append((receipt["leaves"][0]["salt"], receipt["opening"]))
    assert shown[0][0] != shown[1][0]
    assert shown[0][1] != shown[1][1]


def test_the_tenant_opens_the_digests_of_both_bodies(kit: Any, text: Text) -> None:
    receipts = kit.made(1)
    shown = text(receipts, 1, tenant="proj_a")
    verified = verify.verify_receipt(shown, verify.parse_keys(receipts.jwks))
    verify.verify_opening(verified, "prompt", kit.request_body)
    verify.verify_opening(verified, "answer", kit.response_body)
    with pytest.raises(verify.ReceiptInvalid, match="the answer is not the one of this receipt"):
        verify.verify_opening(verified, "answer", kit.response_body + b" ")
    (request,) = verified.leaves
    assert request["prompt_digest"] != hashlib.sha256(kit.request_body).hexdigest()
    operators = verify.verify_receipt(text(receipts, 1), verify.parse_keys(receipts.jwks))
    with pytest.raises(verify.ReceiptInvalid, match="only the tenant's copy"):
        verify.verify_opening(operators, "prompt", kit.request_body)


@pytest.mark.parametrize(
    "reader", [{"tenant": "proj_b"}, {"owner": "vault"}, {"owner": "commons"}], ids=lambda r: next(iter(r.values()))
)
def test_what_does_not_concern_a_reader_is_like_what_does_not_exist(kit: Any, text: Text, reader: Any) -> None:
    receipts = kit.made(1)
    for number in (1, 99):
        with pytest.raises(NoReceipt):
            text(receipts, number, **reader)
    kit.record(2)  # recorded, without a receipt
    with pytest.raises(NoReceipt):
        text(receipts, 2, **reader)
    with pytest.raises(ReceiptPending):
        receipts.show(f"dec_{2:032x}", Reader(tenant="proj_a"))


def test_a_request_that_ends_while_its_receipt_is_sought_is_not_lost(
    kit: Any, name: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    receipts = kit.made(1)
    running = Registration(name(2), 5, "proj_a", "key_a", "/v1", "tiny", 7, 3, ())
    with closing(sqlite3.connect(kit.ledger)) as connection, connection:
        values = running.request, encode_registration(running)
        connection.execute("INSERT INTO running (request, registration) VALUES (?, ?)", values)
    read_one = ledger_rows.read_one

    def then_it_ends(*arguments: Any) -> Any:
        found = read_one(*arguments)
        with closing(sqlite3.connect(kit.ledger)) as connection, connection:
            connection.execute("DELETE FROM running")
        return found

    monkeypatch.setattr(ledger_rows, "read_one", then_it_ends)
    with pytest.raises(ReceiptPending, match="has not ended"):
        receipts.show(name(2), Reader(tenant="proj_a"))
