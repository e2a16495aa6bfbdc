"""Old denied requests leave the audit log of a running server by themselves, changes never."""

from __future__ import annotations

import logging

import pytest

from flexgate.policies.audit import DENIED, Event
from flexgate.policies.store import Store
from flexgate.server.policy.retention import ACTOR, DAY, Retention

NOW = 1000 * DAY


def deny(store: Store, *days_ago: float) -> None:
    store.record([Event(at=NOW - days * DAY, actor="k", action=DENIED, detail={}) for days in days_ago])


def ages(store: Store) -> list[float]:
    """Of the denied requests that are left, in days."""
    return [(NOW - entry.at) / DAY for entry in store.audit_log(limit=1000) if entry.action == DENIED]


def test_denied_requests_go_when_they_are_too_old_and_changes_stay(real_store: Store) -> None:
    before = real_store.audit_log(limit=1000)
    deny(real_store, 92, 90.5, 89, 1)
    Retention(real_store, days=90, clock=lambda: NOW).trim()
    assert ages(real_store) == [89, 1]
    assert real_store.audit_log(limit=len(before)) == before
    assert [entry.actor for entry in real_store.audit_log(limit=1000) if entry.action == "audit.trimmed"] == [ACTOR]
    assert real_store.verify_audit().trimmed == 2


def test_a_trimming_is_recorded_once_a_day_at_most(real_store: Store) -> None:
    deny(real_store, 90.9, 90.5, 1)
    Retention(real_store, days=90, clock=lambda: NOW).trim()
    assert ages(real_store) == [90.9, 90.5, 1]
    Retention(real_store, days=90, clock=lambda: NOW + 0.5 * DAY).trim()
    assert ages(real_store) == [1]


def test_a_store_that_fails_is_asked_again(real_store: Store, caplog: pytest.LogCaptureFixture) -> None:
    deny(real_store, 92, 1)
    url = real_store.engine.url.database
    assert url is not None
    real_store.close()
    broken = Store.open("sqlite:////nowhere/policy.db")
    with caplog.at_level(logging.ERROR):
        Retention(broken, days=90, clock=lambda: NOW).trim()
    assert "the audit log is not trimmed" in caplog.text
    Retention(real_store, days=90, clock=lambda: NOW).trim()
    assert ages(real_store) == [1]
