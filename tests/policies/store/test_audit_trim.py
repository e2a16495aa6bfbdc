"""Old denied requests leave the log, nothing else does, and what is left is verified as before."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import sqlalchemy as sa

from flexgate.policies.audit import DENIED, REQUESTS, Entry, Event, Head, from_line, to_line, verify
from flexgate.policies.documents import Tenant
from flexgate.policies.errors import AuditBroken
from flexgate.policies.store import Store
from flexgate.policies.store import audit as audit_store

NOW = 1_000_000.0
BY = {"actor": "key_admin", "at": NOW}
_names = count()


def deny(store: Store, at: float) -> Head:
    """A denied request in the log; its head."""
    store.record([Event(at=at, actor="anonymous", action=DENIED, detail={"requests": 1})])
    return store.audit_heads()[1]


def change(store: Store, at: float) -> Head:
    """A change in the log; its head."""
    with store.change(actor="admin", at=at) as made:
        made.put(Tenant(id=f"t{next(_names)}", name="t"))
    return store.audit_heads()[0]


@pytest.fixture
def heads(store: Store) -> list[Head]:
    """Changes and denied requests in turn, a hundred seconds apart; the heads after each."""
    found = []
    for number in range(10):
        found += [change(store, 100.0 * number + 1), deny(store, 100.0 * number + 2)]
    return found


def entries(store: Store) -> list[Entry]:
    return store.audit_log(limit=1000)


def test_old_denied_requests_go_and_every_change_stays(store: Store, heads: list[Head]) -> None:
    changes = [entry for entry in entries(store) if entry.log != REQUESTS]
    assert store.trim_audit(before=500.0, **BY) == 5
    left = entries(store)
    assert [entry for entry in left if entry.log != REQUESTS][:-1] == changes
    assert [entry.at for entry in left if entry.log == REQUESTS] == [502.0, 602.0, 702.0, 802.0, 902.0]
    trimmed = left[-1]
    assert (trimmed.action, trimmed.actor, trimmed.at) == ("audit.trimmed", "key_admin", NOW)
    through = heads[9]
    said = {"log": REQUESTS, "before": 500.0, "entries": 5, "through": through.sequence, "hash": through.hash}
    assert trimmed.detail == said


def test_a_trimmed_log_is_verified_with_heads_from_outside(store: Store, heads: list[Head]) -> None:
    store.trim_audit(before=500.0, **BY)
    change(store, NOW)
    deny(store, NOW)
    found = store.verify_audit(outside=heads)
    assert (found.trimmed, found.trimmed_heads) == (5, 4)  # the last that went is named by the log
    assert found.heads == store.audit_heads()
    assert verify([from_line(to_line(entry)) for entry in entries(store)], outside=heads) == found
    assert store.trim_audit(before=800.0, **BY) == 3
    assert store.verify_audit(outside=heads).trimmed == 8


def test_the_newest_denied_request_stays_so_that_the_next_goes_on_from_it(store: Store, heads: list[Head]) -> None:
    assert store.trim_audit(before=NOW, **BY) == 9
    assert store.trim_audit(before=NOW, **BY) == 0
    newest = deny(store, NOW)
    assert store.verify_audit(outside=[heads[-1], newest]).requests == newest


def test_an_old_one_that_came_after_a_newer_one_waits_for_it(store: Store) -> None:
    for at in (1.0, 300.0, 2.0, 3.0, 400.0):
        deny(store, at)
    assert store.trim_audit(before=100.0, **BY) == 1
    assert [entry.at for entry in entries(store) if entry.log == REQUESTS] == [300.0, 2.0, 3.0, 400.0]


def test_few_go_at_once_so_that_changes_do_not_wait(
    store: Store, heads: list[Head], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_store, "MOST_TRIMMED", 2)
    assert [store.trim_audit(before=500.0, **BY) for _ in range(4)] == [2, 2, 1, 0]
    assert store.verify_audit(outside=heads[9:]).trimmed == 5


def test_nothing_goes_before_enough_of_it_is_too_old(store: Store, heads: list[Head]) -> None:
    assert store.trim_audit(before=500.0, spare=499.0, **BY) == 0
    assert store.trim_audit(before=500.0, spare=497.0, **BY) == 5


TAMPERINGS: dict[str, str] = {
    "a change": "DELETE FROM audit_log WHERE sequence = (SELECT min(sequence) FROM audit_log WHERE sequence > 10)",
    "the first change": "DELETE FROM audit_log WHERE sequence = 1",
    "the last trimming": "DELETE FROM audit_log WHERE action = 'audit.trimmed'",
    "the first denied request that is left": "DELETE FROM audit_log WHERE sequence = "
    "(SELECT min(sequence) FROM audit_log WHERE log = 'requests')",
    "a denied request": "DELETE FROM audit_log WHERE sequence = "
    "(SELECT min(sequence) + 2 FROM audit_log WHERE log = 'requests')",
    "every denied request": "DELETE FROM audit_log WHERE log = 'requests'",
    "a change into a denied request": "UPDATE audit_log SET log = 'requests' WHERE sequence = 3",
    "a denied request into a change": "UPDATE audit_log SET log = 'changes' WHERE log = 'requests'",
    "a log without a name": "UPDATE audit_log SET log = 'other' WHERE sequence = 3",
}


@pytest.mark.parametrize("gone", TAMPERINGS)
def test_what_goes_beside_a_trimming_is_noticed_without_heads(store: Store, heads: list[Head], gone: str) -> None:
    store.trim_audit(before=500.0, **BY)
    change(store, NOW)
    store.verify_audit()
    with store.engine.begin() as connection:
        connection.execute(sa.text(TAMPERINGS[gone]))
    with pytest.raises(AuditBroken):
        store.verify_audit()


def _forge(store: Store, *, entries: Any, through: Head) -> None:
    """An entry that follows the rules and says that something else was trimmed."""
    detail = {"log": REQUESTS, "before": 0.0, "entries": entries, "through": through.sequence, "hash": through.hash}
    store.record([Event(at=NOW, actor="mallory", action="audit.trimmed", detail=detail)])


def test_no_change_can_be_passed_off_as_trimmed(store: Store, heads: list[Head]) -> None:
    victim = heads[6]  # a change
    with store.engine.begin() as connection:
        connection.execute(sa.text(f"DELETE FROM audit_log WHERE sequence = {victim.sequence}"))
    _forge(store, entries=1, through=victim)
    with pytest.raises(AuditBroken, match="does not follow from the one before it"):
        store.verify_audit()


@pytest.mark.parametrize("entries_", [0, -1, 1.0, "1", None, True])
def test_a_trimming_without_a_number_is_refused(store: Store, heads: list[Head], entries_: Any) -> None:
    _forge(store, entries=entries_, through=heads[1])
    with pytest.raises(AuditBroken, match="does not name what was trimmed"):
        store.verify_audit()


def test_denied_requests_that_were_written_anew_after_a_trimming_are_told_by_a_head(
    store: Store, heads: list[Head]
) -> None:
    store.trim_audit(before=500.0, **BY)
    with pytest.raises(AuditBroken, match="was kept outside"):
        store.verify_audit(outside=[Head(heads[-1].sequence, "f" * 64, REQUESTS)])
    with pytest.raises(AuditBroken, match="was kept outside"):
        store.verify_audit(outside=[Head(heads[9].sequence, "f" * 64, REQUESTS)])
