"""A PostgreSQL that does not answer is given up."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from postgreskit import PostgresServer

from flexgate.policies.errors import StoreUnavailable
from flexgate.policies.store import postgres as limits
from flexgate.policies.store.budgets import Batch, add_use, read_use
from flexgate.policies.store.database import open_engine, reading, unhurried
from flexgate.policies.store.migrate import check_current, migrate
from flexgate.policies.store.replicas import Process, announce, behind, deregister
from flexgate.policies.store.store import Store

pytestmark = pytest.mark.slow
DOES: dict[str, Callable[[sa.Engine], Any]] = {
    "reading budgets": read_use,
    "writing budgets": lambda engine: add_use(engine, {"t": 1}, Batch("here", 1), 1.0),
    "announcing a process": lambda engine: announce(engine, Process("a", 1, 1.0), at=1.0),
    "deregistering a process": lambda engine: deregister(engine, "a"),
    "asking who is behind": lambda engine: behind(engine, 1),
    "looking at the schema": check_current,
}


@pytest.fixture
def url(postgres: PostgresServer, migrated_database: str) -> Any:
    """PostgreSQL alone."""
    database = postgres.new_database(migrated_database)
    yield database
    postgres.drop(database)


@pytest.mark.parametrize("doing", DOES)
def test_whatever_is_done_while_postgresql_hangs_ends(
    postgres: PostgresServer, empty: Store, monkeypatch: Any, doing: str
) -> None:
    DOES[doing](empty.engine)
    monkeypatch.setattr(limits, "MOST_SECONDS", 0.5)
    late = threading.Timer(15, postgres.resume)
    late.start()
    postgres.pause()
    try:
        with pytest.raises(StoreUnavailable):
            DOES[doing](empty.engine)
        assert late.is_alive()
    finally:
        late.cancel()
        postgres.resume()
    monkeypatch.undo()
    DOES[doing](empty.engine)


def test_an_answer_that_comes_late_is_taken_for_no_other(empty: Store, monkeypatch: Any) -> None:
    refused = pytest.raises(StoreUnavailable, match="PostgreSQL does not answer: check its server and disk")
    with refused, reading(empty.engine) as connection:
        connection.execute(sa.text("SELECT 0"))
        monkeypatch.setattr(limits, "MOST_SECONDS", 0.2)
        connection.execute(sa.text("SELECT 1, pg_sleep(0.5)"))
    monkeypatch.undo()
    time.sleep(0.5)
    with reading(empty.engine) as connection:
        assert connection.scalar(sa.text("SELECT 2")) == 2
        assert connection.connection.driver_connection.info.backend_pid
    assert empty.engine.pool.checkedin() == 1


def test_a_slow_server_ends_a_statement_itself_with_its_locks(url: str, monkeypatch: Any) -> None:
    assert limits.SERVER_SECONDS < limits.MOST_SECONDS
    monkeypatch.setattr(limits, "SERVER_SECONDS", 0.2)
    engine = open_engine(url)
    with pytest.raises(StoreUnavailable, match="statement timeout"), reading(engine) as connection:
        connection.execute(sa.text("SELECT pg_sleep(30)"))
    engine.dispose()


def test_a_migration_takes_as_long_as_it_takes(url: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(limits, "SERVER_SECONDS", 0.2)
    engine = open_engine(url)
    with reading(engine) as connection, unhurried(connection):
        monkeypatch.setattr(limits, "MOST_SECONDS", 0.2)
        connection.execute(sa.text("SELECT pg_sleep(0.5)"))
        monkeypatch.undo()
    engine.dispose()


def test_a_socket_that_accepts_and_says_nothing_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        engine = open_engine(f"postgresql://u@127.0.0.1:{silent.getsockname()[1]}/d")
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            migrate(engine)
        assert time.monotonic() - began < 10
        engine.dispose()
