"""A migrated store with the five experts in it, on SQLite and on a real PostgreSQL server."""

from __future__ import annotations

import os
import shutil
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


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store in SQLite, to be copied: migrating takes longer than most tests."""
    path = tmp_path_factory.mktemp("migrated") / "policy.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def migrated_database(postgres: PostgresServer) -> str:
    """An empty store in PostgreSQL, to be copied."""
    url = postgres.new_database()
    migrate(url)
    return url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of either kind: migrated for a test that asks for a store, else without tables."""
    migrated = "empty" in request.fixturenames
    if request.param == "sqlite":
        if migrated:
            shutil.copy(request.getfixturevalue("migrated_file"), tmp_path / "policy.db")
        yield f"sqlite:///{tmp_path}/policy.db"
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    database = server.new_database(request.getfixturevalue("migrated_database") if migrated else None)
    yield database
    server.drop(database)


def migrate(url: str) -> None:
    store = Store.open(url)
    store.migrate()
    store.close()


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
    yield store
    store.close()


@pytest.fixture
def store(empty: Store) -> Store:
    with empty.change(actor="setup", at=1.0) as change:
        for id_, owner in EXPERTS:
            change.put(Expert(id=id_, owner=owner))
    return empty
