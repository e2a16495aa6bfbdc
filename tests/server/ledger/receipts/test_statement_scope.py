"""What one signed statement counts, and when it is final."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from statementkit import (
    CORRECTION,
    MONTH,
    both,
    page,
    proof,
    resigned,
    signed,
)

from flexgate.server.inference.request.extension import COUNTERFACTUAL
from flexgate.server.ledger.entries import RegisteredExpert
from flexgate.server.ledger.receipts.service import NoReceipt, ReceiptPending
from flexgate.server.ledger.receipts.statements import NotInPeriod, Statements


def test_a_statement_counts_the_calls_that_explain_a_decision(kit: Any, name: Callable[[int], str]) -> None:
    kit.record(1)
    kit.record(1, suffix=f"_{COUNTERFACTUAL}")
    receipts = kit.made(2)
    statement, mine, explained = signed(receipts), page(receipts), f"{name(1)}_{COUNTERFACTUAL}"
    corrected = resigned(kit, statement, corrections=[{**CORRECTION, "amount": "0", "receipt": explained}])
    bundles = [(statement, *mine), (statement, mine[1], proof(receipts, explained)), (corrected, *mine)]
    assert both(receipts.jwks, *bundles) == [True] * 3


def test_a_statement_is_provisional_until_the_period_has_ended_and_all_of_it_has_receipts(
    kit: Any, name: Callable[[int], str]
) -> None:
    receipts = kit.made(1, 2)
    early = signed(receipts, ended=False)
    kit.record(3)
    waiting = signed(receipts)
    said = json.loads(waiting)["statement"]
    assert (said["provisional"], said["receipts"], said["last"]) == (True, "2", "2")
    with pytest.raises(ReceiptPending):
        proof(receipts, name(3))
    receipts.maker.work()
    final, mine, last = signed(receipts), page(receipts), proof(receipts, name(1), last=2)
    assert json.loads(final)["statement"]["provisional"] is False
    assert both(
        receipts.jwks,
        (early, *mine),  # the third came later
        (early, mine[0], last),
        (final, *mine),
        (final, mine[0], last),  # a proof for the provisional one
        (final, early, *mine),
    ) == [True, True, True, False, True]
    for number, last in ((3, 2), (1, 0)):
        with pytest.raises(NotInPeriod):
            proof(receipts, name(number), last=last)


def test_a_statement_counts_its_owners_receipts_of_its_server_alone(
    make_kit: Callable[[str], Any], name: Callable[[int], str]
) -> None:
    """Receipts of requests in which no expert of the owner took part, of other owners and servers, are not counted."""
    kit = make_kit("one")
    kit.record(1)
    kit.record(2, experts=(RegisteredExpert(0, "public", None), RegisteredExpert(3, "math", "academy", "a-math", 2)))
    receipts, other = kit.made(3), make_kit("other").made(1)
    statement, mine = signed(receipts), page(receipts)
    assert len(mine) == 2
    assert json.loads(statement)["statement"]["receipts"] == "2"
    assert both(receipts.jwks, (statement, *mine, *page(receipts, "academy"))) == [True]
    assert both(other.jwks, (statement, *page(other))) == [False]
    for absent in (name(2), name(9)):
        with pytest.raises(NoReceipt):
            proof(receipts, absent)


def test_an_owner_without_receipts_gets_a_statement_of_none(kit: Any) -> None:
    receipts = kit.made(1)
    empty = signed(receipts, owner="stranger")
    assert json.loads(empty)["statement"]["totals"] == []
    assert both(receipts.jwks, (empty,)) == [True]


def test_without_its_key_no_statement_is_signed(kit: Any) -> None:
    from flexgate.server.ledger.receipts.signing import SignerUnavailable

    receipts = kit.made(1)
    kit.key.path.rename(kit.key.path.with_suffix(".away"))
    kit.key.make()
    with pytest.raises(SignerUnavailable, match="rotate-key"):
        signed(receipts)
    kit.key.path.unlink()
    with pytest.raises(SignerUnavailable, match="restore the file"):
        signed(receipts)


def test_pages_of_receipts_follow_one_another(kit: Any) -> None:
    receipts = kit.made(*range(1, 8))
    statements = Statements(receipts)
    found, after = [], 0
    while page := statements.page("gazette", MONTH, after=after, limit=3):
        found += [int(one["number"]) for one in page]
        after = found[-1]
    assert found == [1, 2, 3, 4, 5, 6, 7]
