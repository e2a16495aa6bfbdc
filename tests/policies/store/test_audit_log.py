"""Every change is in the audit log, in the same transaction; the stored log can be verified."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from flexgate.policies.audit import CHANGES, Event, verify
from flexgate.policies.documents import Role, Tenant
from flexgate.policies.errors import AuditBroken, StoreUnavailable
from flexgate.policies.store import schema
from flexgate.policies.store.audit import Sought, count_denied, search

ACME = Tenant(id="acme", name="Acme")


def _put(store, *documents, at=2.0):
    with store.change(actor="admin", note="why", at=at) as change:
        for document in documents:
            change.put(document)


def test_every_change_is_recorded_with_before_and_after(store):
    _put(store, ACME)
    _put(store, ACME.model_copy(update={"name": "Renamed"}), at=3.0)
    created, updated = store.audit_log()[-2:]
    assert (created.action, created.actor, created.at) == ("tenant.created", "admin", 2.0)
    assert (updated.action, updated.detail["policy_version"]) == ("tenant.updated", 3)
    assert updated.detail["before"]["name"] == "Acme"
    assert updated.detail["after"]["name"] == "Renamed"


def test_no_key_is_in_the_log(store):
    _put(store, ACME)
    with store.change(actor="admin", at=3.0) as change:
        minted = change.mint_key(Role.TENANT, tenant_id="acme")
        change.revoke_key(minted.record.key_id)
    entries = store.audit_log()[-2:]
    assert [e.action for e in entries] == ["api_key.created", "api_key.updated"]
    text = repr(store.audit_log())
    assert minted.secret[-43:] not in text
    assert minted.record.sha256.hex() not in text


def test_denied_requests_are_recorded_beside_changes(store):
    denied = Event(at=2.0, actor="key_1", action="request.denied", detail={"experts": ["news"]})
    store.record([denied, denied])
    heads = store.audit_heads()
    _put(store, ACME)
    found = store.verify_audit(outside=heads)
    assert (found.changes.sequence, found.requests, found.entries) == (8, heads[1], 8)
    assert store.audit_heads() == found.heads


def test_pages_follow_each_other(store):
    first = store.audit_log(limit=2)
    assert [e.sequence for e in first] == [1, 2]
    rest = store.audit_log(after=2)
    assert verify([*first, *rest]).heads == store.audit_heads()


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE audit_log SET actor = 'nobody' WHERE sequence = 2",
        "UPDATE audit_log SET at = at + 1 WHERE sequence = 5",
        "UPDATE audit_log SET detail = '{}' WHERE sequence = 3",
        "DELETE FROM audit_log WHERE sequence = 1",
        "DELETE FROM audit_log WHERE sequence = 3",
        "DELETE FROM audit_log WHERE sequence = 5",
        "DELETE FROM audit_log",
        "UPDATE audit_log SET sequence = 9 WHERE sequence = 5",
    ],
)
def test_tampering_with_the_table_is_detected(store, tampering):
    heads = store.audit_heads()
    assert heads[0].sequence == 5
    with store.engine.begin() as connection:
        connection.execute(sa.text(tampering))
    with pytest.raises(AuditBroken):
        store.verify_audit(outside=heads)


def test_change_fails_when_the_log_cannot_be_written(store):
    with store.engine.begin() as connection:
        schema.audit_log.drop(connection)
    version = store.version()
    with pytest.raises(StoreUnavailable):
        _put(store, ACME)
    assert store.version() == version
    assert "acme" not in store.snapshot().tenants


def test_entries_of_a_time_are_found_by_an_index(store):
    """Statements ask for them: a log of years is not read for a month."""
    if store.engine.dialect.name != "sqlite":
        pytest.skip("PostgreSQL reads small tables as a whole")
    asked = []
    sa.event.listen(store.engine, "before_cursor_execute", lambda *given: asked.append(given[2:4]))
    count_denied(store.engine, 1.0, 2.0, lambda *_: True)
    search(store.engine, Sought(since=1.0, until=2.0, log=CHANGES), limit=5, oldest=True)
    queries = [(query, values) for query, values in asked if "FROM audit_log" in query]
    assert len(queries) == 2
    with store.engine.connect() as connection:
        for query, values in queries:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}", values).all()
            assert "ix_audit_log_at" in str(plan), plan
