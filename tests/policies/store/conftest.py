"""A migrated store with the five experts in it, on SQLite and on a real PostgreSQL server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from postgreskit import PostgresServer, find, running

from flexgate.policies.documents import Expert
from flexgate.policies.store import Store

EXPERTS = [
    ("public", "commons"),
    ("news", "wire"),
    ("math", "institute"),
    ("code", "forge"),
    ("legal", "forge"),
]


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """Where PostgreSQL is not installed, these tests are left out; never in CI."""
    if find("postgres") is None and not os.environ.get("CI"):
        pytest.skip("PostgreSQL is not installed")
    with running() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/policy.db"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_database()


@pytest.fixture
def sqlite_file(url: str) -> str:
    """The database's path; skips a test that is about SQLite's files elsewhere."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite":
        pytest.skip("about SQLite's files")
    return parsed.database


@pytest.fixture
def empty(url: str) -> Iterator[Store]:
    store = Store.open(url)
    store.migrate()
    yield store
    store.close()


@pytest.fixture
def store(empty: Store) -> Store:
    with empty.change(actor="setup", at=1.0) as change:
        for id_, owner in EXPERTS:
            change.put(Expert(id=id_, owner=owner))
    return empty
