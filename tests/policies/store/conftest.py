"""A migrated store with the five experts in it, on SQLite and on a real PostgreSQL server."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from flexgate.policies.store import Store
from flexgate.policies.tenants import Expert

EXPERTS = [
    ("public", "commons"),
    ("news", "wire"),
    ("math", "institute"),
    ("code", "forge"),
    ("legal", "forge"),
]


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A PostgreSQL server of our own on a socket, run as another user if we are root."""
    if shutil.which("initdb") is None or shutil.which("postgres") is None:
        pytest.skip("PostgreSQL is not installed")
    user = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="pg", ignore_cleanup_errors=True) as folder:
        if user:
            shutil.chown(folder, **user)
        data = f"{folder}/data"
        initdb = ["initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8"]
        subprocess.run(initdb, check=True, capture_output=True, cwd=folder, **user)
        options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}"]
        command = ["postgres", "-D", data, "-F", *options]
        server = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL, **user)
        try:
            base = f"postgresql://postgres@/postgres?host={folder}"
            _wait_for(base)
            yield base
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=30)


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            with sa.create_engine(url).connect():
                return
        except sa.exc.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/policy.db"
    base = sa.make_url(request.getfixturevalue("postgres"))
    name = f"policy_{uuid.uuid4().hex}"
    engine = sa.create_engine(base, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return base.set(database=name).render_as_string(hide_password=False)


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
