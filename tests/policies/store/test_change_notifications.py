"""A change is notified where the database can; where it cannot, or a notification is lost, a poll finds it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from flexgate.policies.documents import Tenant
from flexgate.policies.store import Store
from flexgate.policies.store.change_notifications import ChangeNotifications, notify

LONG_S = 20.0


@pytest.fixture
def notifications(store: Store) -> Iterator[ChangeNotifications]:
    notifications = ChangeNotifications(store.engine)
    yield notifications
    notifications.close()


def _put(store: Store, name: str) -> None:
    with store.change(actor="tester", at=time.time()) as change:
        change.put(Tenant(id="acme", name=name))


def _waited(notifications: ChangeNotifications, seconds: float) -> float:
    began = time.monotonic()
    notifications.wait(seconds)
    return time.monotonic() - began


def _only_postgresql(store: Store) -> None:
    if store.engine.dialect.name != "postgresql":
        pytest.skip("SQLite gives no notifications")


def test_without_a_change_the_wait_lasts_as_long_as_asked(notifications: ChangeNotifications) -> None:
    assert all(0.2 <= _waited(notifications, 0.2) < 2 for _ in range(2))


def test_a_committed_change_ends_the_wait(store: Store, notifications: ChangeNotifications) -> None:
    _only_postgresql(store)
    notifications.wait(0.01)
    for name in ("A", "B"):
        timer = threading.Timer(0.2, _put, (store, name))
        timer.start()
        assert 0.1 < _waited(notifications, LONG_S) < LONG_S / 2
        timer.join()


def test_a_change_that_is_not_committed_notifies_no_server(store: Store, notifications: ChangeNotifications) -> None:
    _only_postgresql(store)
    notifications.wait(0.01)
    with store.engine.connect() as connection:
        notify(connection)
        connection.rollback()
    assert _waited(notifications, 0.3) >= 0.3


def test_a_broken_connection_loses_notifications_and_is_made_again(
    store: Store, notifications: ChangeNotifications
) -> None:
    _only_postgresql(store)
    notifications.wait(0.01)
    with store.engine.connect() as connection:
        connection.execute(
            sa.text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND query LIKE 'LISTEN%'"
            )
        )
    _put(store, "lost")
    assert _waited(notifications, 0.3) >= 0.3
    notifications.wait(0.01)
    _put(store, "heard")
    assert _waited(notifications, LONG_S) < LONG_S / 2


def test_an_unreachable_database_only_lets_time_pass() -> None:
    store = Store.open("postgresql://postgres@/nowhere?host=/nonexistent")
    notifications = ChangeNotifications(store.engine)
    assert _waited(notifications, 0.2) >= 0.2
    notifications.close()
    store.close()
