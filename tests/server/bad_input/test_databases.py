"""Databases that are down, locked, broken or another version's, before a start, under a command and under a server.

Each is refused in one sentence, and its content is what it was before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from policy_file import LIVE, content_of, refusal, run
from typer.testing import Result

from flexgate.policies.store import Store
from flexgate.policies.store import database as engine
from flexgate.server.policy.source import PolicySource

Break = Callable[[Path], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def _no_database(path: Path) -> Iterator[None]:
    aside = path.with_suffix(".aside")
    path.rename(aside)
    path.mkdir()
    yield
    path.rmdir()
    aside.rename(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


@contextlib.contextmanager
def _garbage(path: Path) -> Iterator[None]:
    kept = path.read_bytes()
    path.write_bytes(b"this is not a database" * 500)
    yield
    path.write_bytes(kept)


@contextlib.contextmanager
def _torn(path: Path) -> Iterator[None]:
    """The first page says what there is, and nothing of it is there."""
    kept = path.read_bytes()
    path.write_bytes(kept[:4096] + b"\x2a" * (len(kept) - 4096))
    yield
    path.write_bytes(kept)


def _damaging(statement: str) -> Break:
    """The database with one row spoilt."""

    @contextlib.contextmanager
    def damaged(path: Path) -> Iterator[None]:
        kept = path.read_bytes()
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("PRAGMA journal_mode = DELETE")
            assert connection.execute(statement).rowcount > 0
        yield
        path.write_bytes(kept)

    return damaged


BROKEN: dict[str, tuple[Break, str]] = {
    "down": (_no_database, "the store cannot be used: unable to open database file"),
    "locked": (_locked, "the store cannot be used: database is locked"),
    "no database": (_garbage, "the store cannot be used: file is not a database"),
    "torn": (_torn, "the store cannot be used: database disk image is malformed"),
    "newer": (
        _damaging("UPDATE alembic_version SET version_num = '9999'"),
        "the store's schema is at '9999', which this version of flexgate does not know: start the newer version that "
        "migrated it",
    ),
}
_ADDED = "INSERT INTO weights_epochs VALUES (2, 1.0, 'test', 'added', 'extra', 5, 'job_1', '{}')"
DAMAGED: dict[str, tuple[Break, str]] = {
    "document": (
        _damaging('UPDATE tenants SET document = \'{"id": "acme", "name": 1}\' WHERE id = \'acme\''),
        "the stored tenant 'acme' does not parse ('name' must be a string): restore a backup of the database",
    ),
    "no JSON": (
        _damaging("UPDATE tenants SET document = '{\"id\": ' WHERE id = 'acme'"),
        "a stored document cannot be read as JSON (Expecting value): restore a backup of the database",
    ),
    "key": (
        _damaging("UPDATE api_keys SET role = 'god'"),
        "' does not parse ('role' must be 'tenant', 'admin', 'auditor' or 'owner'): restore a backup of the database",
    ),
    "time of a revision": (
        _damaging("UPDATE policy_revisions SET at = 'x'"),
        " does not parse ('at' must be a number): restore a backup of the database",
    ),
    "time that is no date": (
        _damaging("UPDATE policy_revisions SET at = 1e300"),
        " does not parse ('at' must be at most 253402300799): restore a backup of the database",
    ),
    "change of weights without a version": (
        _damaging(_ADDED.format("{}")),
        "the stored change of weights 2 does not parse ('version' is required): restore a backup of the database",
    ),
    "version that is no number": (
        _damaging(_ADDED.format('{"version": "1", "weights_digest": "", "base_digest": ""}')),
        "the stored change of weights 2 does not parse ('version' must be an integer): restore a backup of "
        "the database",
    ),
    "what does not fit": (
        _damaging('UPDATE tenants SET document = \'{"id": "acme", "name": "A", "expert_ids": ["zzz"]}\''),
        "the stored policy is inconsistent (tenant acme names the unknown expert 'zzz'): restore a backup of "
        "the database",
    ),
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_MS", 20)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", [*BROKEN, *DAMAGED])
def test_a_start_refuses_a_database_that_cannot_be_used(serve: Callable[[], Result], database: Path, name: str) -> None:
    breaking, said = (BROKEN | DAMAGED)[name]
    before = content_of(database)
    place = f" (sqlite:///{database})" if said.startswith("the store cannot be used") else ""
    with breaking(database):
        assert refusal(serve()).endswith(said + place)
    assert content_of(database) == before
    assert refusal(serve()).endswith("the engine would be started now")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", BROKEN)
def test_a_command_refuses_a_database_that_cannot_be_used(real_store: Store, name: str) -> None:
    path = Path(str(real_store.engine.url.database))
    real_store.close()
    breaking, said = BROKEN[name]
    before = content_of(path)
    with breaking(path):
        sentence = refusal(run("tenants", "create", "Acme", f"--database-url={real_store.engine.url}"))
    assert sentence.endswith(said) or (name == "down" and "there is no policy database" in sentence)
    assert content_of(path) == before


@pytest.mark.asyncio
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", BROKEN)
async def test_a_running_server_refuses_until_the_database_is_back(
    services: Any, make_client: Any, real_store: Store, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "flexgate.server")
    path = Path(str(real_store.engine.url.database))
    breaking, said = BROKEN[name]
    real_store.close()
    before = content_of(path)

    async def asked(key: str, method: str, path: str, **body: Any) -> tuple[int, Any]:
        async with make_client(key) as http:
            answer = await http.request(method, path, json=body)
        return answer.status_code, answer.json().get("error", {}).get("code")

    create = ("sk-admin", "POST", "/v1/organization/projects")
    with breaking(path):
        assert await asked(*create, name="new") == (503, "policy_unavailable")
        services.policy = PolicySource(real_store, lambda: LIVE, lease_s=0.5, poll_s=60)
        await _poll_once(services.policy, caplog)
        assert await asked("sk-t", "GET", "/v1/experts") == (503, "policy_unavailable")
        assert await asked(*create, name="new") == (503, "policy_unavailable")
        real_store.close()
    if name == "down":
        said = (
            f"the database {path} was replaced or deleted while it was in use: restart the server to use the file that "
            "is there now, or move the original file back"
        )
    logged = {record.getMessage() for record in caplog.records}
    assert {f"the policy store cannot be used: {said}", f"the policy database does not answer: {said}"} <= logged
    assert content_of(path) == before
    services.policy = PolicySource(real_store, lambda: LIVE, lease_s=60, poll_s=0.01)
    assert await asked("sk-t", "GET", "/v1/experts") == (200, None)
    assert await asked(*create, name="new") == (200, None)


async def _poll_once(policy: PolicySource, caplog: pytest.LogCaptureFixture) -> None:
    polling = asyncio.create_task(policy.run())
    while "does not answer" not in caplog.text:
        assert not polling.done()
        await asyncio.sleep(0.01)
    polling.cancel()
