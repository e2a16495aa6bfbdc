"""What many ask for is made once, and beside it the server gets on."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from flexgate.server.ledger import statements as sums
from flexgate.server.ledger.receipts import merkle, statements, trees
from flexgate.server.ledger.receipts.signing import KeyFile, SignerUnavailable
from flexgate.server.ledger.receipts.statements import Statements
from flexgate.server.ledger.statements import Period

MONTH = Period.of("1970-01")
Name = Callable[[int], str]


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[object]:
    """A function's calls from now on."""
    real, calls = getattr(module, name), list[object]()

    def count(*given: Any, **options: Any) -> Any:
        calls.append(given)
        return real(*given, **options)

    monkeypatch.setattr(module, name, count)
    return calls


def sign(receipts: Any, owner: str = "gazette", at: float = 9e6) -> Any:
    return Statements(receipts).sign(owner, MONTH, lambda _: TERMS, at=at, ended=True)


class _Terms(dict[Any, Any]):
    """Agreements that pay nothing."""

    def __missing__(self, _: object) -> Any:
        return self

    duties = ()


TERMS = _Terms()


def test_one_tree_proves_every_receipt_until_there_are_new_ones(
    kit: Any, name: Name, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipts = kit.made(*range(1, 10))
    grown = counted(monkeypatch, statements, "grow_tree")
    for number in range(1, 10):
        shown = Statements(receipts).prove("gazette", MONTH, name(number), last=None)
        assert (shown["index"], shown["receipts"]) == (str(number - 1), "9")
    assert len(grown) == 1
    kit.record(10)
    receipts.maker.work()
    assert Statements(receipts).prove("gazette", MONTH, name(10), last=None)["receipts"] == "10"
    assert Statements(receipts).prove("gazette", MONTH, name(3), last=9)["receipts"] == "9"
    assert Statements(receipts).prove("academy", MONTH, name(3), last=9)["receipts"] == "9"
    assert len(grown) == 3


def test_those_who_ask_for_the_same_at_once_share_it() -> None:
    recent, made, barrier = trees.Recent[object](2, lambda _: 1), list[int](), threading.Barrier(8)

    def ask() -> None:
        barrier.wait(10)
        recent.of("key", lambda: made.append(1))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert made == [1]


def test_no_more_is_kept_than_was_said_and_no_error() -> None:
    recent = trees.Recent[int](2, lambda _: 1)
    assert [recent.of(key, lambda key=key: key * 10) for key in (1, 2, 1, 3)] == [10, 20, 10, 30]
    assert recent.of(1, lambda: 0) == 10
    assert recent.of(2, lambda: 21) == 21
    with pytest.raises(ZeroDivisionError):
        recent.of(5, lambda: 1 // 0)
    assert recent.of(5, lambda: 50) == 50


def test_what_is_larger_than_all_that_is_kept_is_made_each_time() -> None:
    recent = trees.Recent[int](10, lambda size: size)
    assert [recent.of(key, lambda size=size: size) for key, size in ((1, 4), (2, 4), (3, 11), (4, 4))] == [4, 4, 11, 4]
    assert [recent.of(key, lambda: 0) for key in (3, 4)] == [0, 4]


def test_who_makes_slowly_holds_up_no_one_who_asks_for_something_else() -> None:
    recent, began, go_on = trees.Recent[str](2, lambda _: 1), threading.Event(), threading.Event()
    recent.of("kept", lambda: "kept")

    def make() -> str:
        began.set()
        go_on.wait(20)
        return "slow"

    slow = threading.Thread(target=recent.of, args=("slow", make))
    slow.start()
    assert began.wait(10)
    others = threading.Thread(target=lambda: [recent.of("kept", lambda: "again"), recent.of("new", lambda: "new")])
    others.start()
    others.join(10)
    held_up = others.is_alive()
    go_on.set()
    slow.join(10)
    assert not held_up


def test_a_tree_rests_after_each_piece(kit: Any, name: Name, monkeypatch: pytest.MonkeyPatch) -> None:
    receipts = kit.made(*range(1, 41))
    monkeypatch.setattr(merkle, "PIECE", 10)
    rests = counted(monkeypatch, trees, "rest")
    Statements(receipts).prove("gazette", MONTH, name(7), last=None)
    assert len(rests) >= 4 + 2 + 1  # leaves, and two levels of nodes


def test_a_statement_is_signed_again_only_if_it_says_something_else(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    receipts = kit.made(1, 2, 3)
    signatures = counted(monkeypatch, KeyFile, "sign")
    first = sign(receipts)
    assert sign(receipts, at=9.1e6) == first
    assert len(signatures) == 1
    assert sign(receipts, "academy") != first
    assert len(signatures) == 2
    row = "'cor_1', 'correction', 'gazette', 'dec_1', 9500000, 'key_1', 'counted twice', '-0.5', 'EUR', NULL"
    with closing(sqlite3.connect(kit.ledger)) as connection, connection:
        connection.execute(f"INSERT INTO corrections VALUES (NULL, {row})")
    corrected = sign(receipts)
    assert [one["id"] for one in corrected["statement"]["corrections"]] == ["cor_1"]
    kit.record(4)
    receipts.maker.work()
    before = len(signatures)
    assert (sign(receipts)["statement"]["receipts"], sign(receipts)["statement"]["receipts"]) == ("4", "4")
    assert len(signatures) == before + 1


def test_a_statement_is_not_shown_where_the_key_is_another_one_now(kit: Any, tmp_path: Any) -> None:
    receipts = kit.made(1)
    sign(receipts)
    receipts.maker.signer = KeyFile(tmp_path / "other.pem")
    receipts.maker.signer.make()
    with pytest.raises(SignerUnavailable):
        sign(receipts)


@pytest.mark.parametrize("query", [sums._FIRST, sums._LAST])
def test_the_ends_of_a_period_are_found_without_reading_it(kit: Any, query: str) -> None:
    kit.record(1)
    with closing(sqlite3.connect(kit.ledger)) as connection:
        (step,) = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}", (5,))]
    assert step.startswith("SEARCH usage USING COVERING INDEX usage_ended_at (ended_at")
