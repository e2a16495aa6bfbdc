"""What contradicts itself, names what is not there or comes from a broken database, at every door.

Wherever it comes in, it is refused in words that say where and what would be right, and the policy, the
audit log and the database's content are what they were before.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner, Result

from flexgate.policies.decide import decide
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.errors import ChangeRefused
from flexgate.policies.store import Store, engine, gitops
from flexgate.policies.tenants import Tenant
from flexgate.server import process
from flexgate.server.cli import app
from flexgate.server.clock import Clock
from flexgate.server.past import Past
from flexgate.server.policy import PolicySource
from flexgate.server.settings import Settings

LIVE = ("public", "news", "math", "secret")
MATH = {"id": "n", "owner": "academy", "experts": ["math"], "assignee": "everyone", "effect": "permit"}
T = {"id": "t", "name": "t"}
PERMISSIONS = "/v1/organization/projects/t/expert_permissions"
AGREEMENTS = "/v1/agreements"
THERE_ARE = "there are math, news, public, secret"


class Bad(NamedTuple):
    """One mistake in a policy file and in a request, and what each is told."""

    file: dict[str, Any]
    said: str
    request: tuple[str, dict[str, Any]] | None = None
    answered: str | None = None


def _agreement(said: str, answered: str | None = None, **terms: Any) -> Bad:
    return Bad({"agreements": [{**MATH, **terms}]}, said, (AGREEMENTS, {**MATH, **terms}), answered)


DOCUMENTS = {
    "agreement twice": Bad(
        {"agreements": [MATH, {**MATH, "effect": "prohibit"}]},
        "agreements: 'n' is there twice",
        (AGREEMENTS, {**MATH, "id": "a-math", "effect": "prohibit"}),
        "The id 'a-math' is taken: choose another one.",
    ),
    "other terms under a version": Bad(
        {"agreements": [{**MATH, "id": "a-math", "effect": "prohibit"}]},
        "agreement 'a-math' was stored as version 1: different terms need version 2 or a higher one",
        (f"{AGREEMENTS}/a-math", {**MATH, "id": "a-math", "effect": "prohibit", "version": 1}),
        "Agreement 'a-math' would get version 2, not 1.",
    ),
    "terms of someone else's expert": _agreement(
        "agreement 'n' is 'academy''s, and 'news' belongs to 'gazette': an owner gives terms for its own experts only",
        experts=["news"],
    ),
    "terms of an unknown expert": _agreement(
        f"agreement 'n' names the unknown expert 'zzz': {THERE_ARE}", experts=["zzz"]
    ),
    "terms of an unknown set": _agreement(
        "agreement 'n' names the unknown set 'set:zzz': there is none yet", experts=["set:zzz"]
    ),
    "terms for an unknown tenant": _agreement(
        "agreement 'n' names the unknown tenant 'zzz': create it first", assignee="tenant:zzz"
    ),
    "an end before the start": _agreement(
        "agreements.0: not_after must be later than not_before",
        "The request: not_after must be later than not_before.",
        not_before="2027-01-01T00:00:00Z",
        not_after="2026-01-01T00:00:00Z",
    ),
    "tenant with an unknown expert": Bad(
        {"tenants": [{**T, "expert_ids": ["zzz"]}]},
        f"tenant 't' names the unknown expert 'zzz': {THERE_ARE}",
        (PERMISSIONS, {"mode": "deny_list", "expert_ids": ["zzz"]}),
    ),
    "set with an unknown expert": Bad(
        {"expert_sets": [{"id": "set:s", "experts": ["zzz"]}]},
        f"set 'set:s' names the unknown expert 'zzz': {THERE_ARE}",
    ),
    "unknown expert hidden": Bad(
        {"hidden_experts": ["zzz"]}, f"hidden_experts names the unknown expert 'zzz': {THERE_ARE}"
    ),
}


@pytest.fixture
def services(services: Any, real_store: Store) -> Any:
    services.policy = PolicySource(real_store, lambda: LIVE, lease_s=60, poll_s=0.01)
    services.policy.confirm()
    return services


@pytest.fixture
def unchanged(real_store: Store) -> Iterator[None]:
    """Nothing of the store is another at the end."""
    before = real_store.snapshot(), real_store.audit_head()
    yield
    assert (real_store.snapshot(), real_store.verify_audit()) == before


def _content(bad: Bad) -> dict[str, Any]:
    return {"format": "flexgate-policy/v1", **bad.file}


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("bad", DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_bad_document_is_refused_by_the_store(real_store: Store, bad: Bad) -> None:
    with pytest.raises(ChangeRefused) as refused:
        gitops.apply(real_store, gitops.parse_file(_content(bad)), actor="test", at=9.0)
    assert str(refused.value) == bad.said


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("bad", DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_bad_document_is_refused_in_a_file(real_store: Store, tmp_path: Path, bad: Bad) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(json.dumps(_content(bad)))
    for command in ("apply", "diff", "simulate"):
        found = _run("policy", command, str(path), f"--database-url={real_store.engine.url}")
        assert _refusal(found).endswith(bad.said)


@pytest.mark.asyncio
@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("name", [name for name, bad in DOCUMENTS.items() if bad.request])
async def test_a_bad_document_is_refused_over_http(make_client: Any, name: str) -> None:
    bad = DOCUMENTS[name]
    assert bad.request is not None
    async with make_client("sk-admin") as http:
        path, body = bad.request
        answer = await http.post(path, json=body)
        simulated = await http.post("/v1/policy/simulate", json={"policy": _content(bad)})
    assert (answer.status_code, simulated.status_code) == (400, 400)
    said = bad.answered or f"{bad.said[:1].upper()}{bad.said[1:]}."
    assert answer.json()["error"]["message"] == said


@pytest.mark.asyncio
async def test_of_contradicting_agreements_the_prohibition_holds_at_every_door(
    real_store: Store, make_client: Any, tmp_path: Path
) -> None:
    def allowed() -> tuple[str, ...]:
        return decide(real_store.snapshot(), "u", DecisionRequest(decision_id="d"), time.time()).allowed

    path = tmp_path / "policy.yaml"
    path.write_text(json.dumps({"format": "flexgate-policy/v1", "agreements": [{**MATH, "effect": "prohibit"}]}))
    assert "math" in allowed()
    assert _run("policy", "apply", str(path), f"--database-url={real_store.engine.url}").exit_code == 0
    assert "math" not in allowed()
    async with make_client("sk-admin") as http:
        assert (await http.post(AGREEMENTS, json={**MATH, "id": "again"})).status_code == 200
        assert "math" not in allowed()
        assert (await http.delete(f"{AGREEMENTS}/n")).status_code == 200
        assert "math" in allowed()
        body = {**MATH, "id": "never", "effect": "prohibit"}
        assert (await http.post(AGREEMENTS, json=body)).status_code == 200
    assert "math" not in allowed()


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
        "the stored tenant 'acme' does not parse (name: Input should be a valid string): put a copy of the database "
        "back",
    ),
    "no JSON": (
        _damaging("UPDATE tenants SET document = '{\"id\": ' WHERE id = 'acme'"),
        "a stored document is not JSON (Expecting value: line 1 column 8 (char 7)): put a copy of the database back",
    ),
    "key": (
        _damaging("UPDATE api_keys SET role = 'god'"),
        "' does not parse (role: Input should be 'tenant', 'admin', 'auditor' or 'owner'): put a copy of the database "
        "back",
    ),
    "time of a revision": (
        _damaging("UPDATE policy_revisions SET at = 'x'"),
        " does not parse (at: Input should be a valid number, unable to parse string as a number): put a copy of the "
        "database back",
    ),
    "time that is no date": (
        _damaging("UPDATE policy_revisions SET at = 1e300"),
        " does not parse (at: Input should be less than or equal to 253402300799): put a copy of the database back",
    ),
    "change of weights without a version": (
        _damaging(_ADDED.format("{}")),
        "the stored change of weights 2 does not parse (version: Field required): put a copy of the database back",
    ),
    "version that is no number": (
        _damaging(_ADDED.format('{"version": "1", "weights_digest": "", "base_digest": ""}')),
        "the stored change of weights 2 does not parse (version: Input should be a valid integer): put a copy of the "
        "database back",
    ),
    "what does not fit": (
        _damaging('UPDATE tenants SET document = \'{"id": "acme", "name": "A", "expert_ids": ["zzz"]}\''),
        "the stored policy does not fit together (tenant acme names the unknown expert 'zzz'): put a copy of the "
        "database back",
    ),
}


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def _refusal(found: Result) -> str:
    """The one sentence of a command that failed."""
    assert found.exit_code == 1, found.output
    (sentence,) = found.stderr.splitlines()
    return str(sentence)


def _settle(path: Path) -> None:
    """Everything in the one file."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode = DELETE")


def _content_of(path: Path) -> str:
    """Every row of every table."""
    _settle(path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return "\n".join(connection.iterdump())


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_MS", 20)


@pytest.fixture
def serve(text_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Result]:
    """`flexgate serve` on a database of the test's own, up to where the engine would be started."""

    def engine_started(*_: object) -> None:
        raise ChangeRefused("the engine would be started now")

    monkeypatch.setattr(process, "launch", engine_started)
    monkeypatch.setattr("flexgate.server.logs.configure", lambda _: None)
    return lambda: _run("serve", str(text_checkpoint), "--port=0", f"--state-dir={tmp_path / 'state'}")


@pytest.fixture
def database(serve: Callable[[], Result], tmp_path: Path) -> Path:
    """What a first start makes, with a tenant in it."""
    assert _refusal(serve()).endswith("the engine would be started now")
    path = tmp_path / "state" / "flexgate.db"
    store = Store.open(f"sqlite:///{path}")
    with store.change(actor="test", at=time.time()) as change:
        change.put(Tenant(id="acme", name="Acme"))
    store.close()
    return path


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", [*BROKEN, *DAMAGED])
def test_a_start_refuses_a_database_that_cannot_be_used(serve: Callable[[], Result], database: Path, name: str) -> None:
    breaking, said = (BROKEN | DAMAGED)[name]
    before = _content_of(database)
    with breaking(database):
        assert _refusal(serve()).endswith(said)
    assert _content_of(database) == before
    assert _refusal(serve()).endswith("the engine would be started now")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", BROKEN)
def test_a_command_refuses_a_database_that_cannot_be_used(real_store: Store, name: str) -> None:
    path = Path(str(real_store.engine.url.database))
    real_store.close()
    breaking, said = BROKEN[name]
    before = _content_of(path)
    with breaking(path):
        sentence = _refusal(_run("tenants", "create", "Acme", f"--database-url={real_store.engine.url}"))
    assert sentence.endswith(said) or (name == "down" and "there is no policy database" in sentence)
    assert _content_of(path) == before


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
    before = _content_of(path)

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
    logged = {record.getMessage() for record in caplog.records}
    assert {f"the policy store cannot be used: {said}", f"the policy cannot be confirmed: {said}"} <= logged
    assert _content_of(path) == before
    services.policy = PolicySource(real_store, lambda: LIVE, lease_s=60, poll_s=0.01)
    assert await asked("sk-t", "GET", "/v1/experts") == (200, None)
    assert await asked(*create, name="new") == (200, None)


async def _poll_once(policy: PolicySource, caplog: pytest.LogCaptureFixture) -> None:
    polling = asyncio.create_task(policy.run())
    while "cannot be confirmed" not in caplog.text:
        assert not polling.done()
        await asyncio.sleep(0.01)
    polling.cancel()


@pytest.fixture
def yesterday(database: Path, text_checkpoint: Path, tmp_path: Path) -> Callable[[], None]:
    """Puts back the database as it was before the last change that the server confirmed."""
    _settle(database)
    copy = shutil.copy(database, tmp_path / "yesterday.db")
    store = Store.open(f"sqlite:///{database}")
    with store.change(actor="test", at=time.time()) as change:
        change.put(Tenant(id="acme", name="Acme", archived=True))
    _past(text_checkpoint, tmp_path).note(store.snapshot())
    store.close()
    _settle(database)

    def put_back() -> None:
        shutil.copy(copy, database)

    return put_back


def _past(model: Path, tmp_path: Path) -> Past:
    return Past(Settings(model=model, state_dir=tmp_path / "state").directory() / "policy.json")


def test_a_start_refuses_yesterdays_file_until_somebody_accepts_it(
    serve: Callable[[], Result], database: Path, yesterday: Callable[[], None], tmp_path: Path
) -> None:
    assert _refusal(serve()).endswith("the engine would be started now")
    yesterday()
    before = _content_of(database)
    sentence = _refusal(serve())
    (mark,) = (tmp_path / "state").glob("served-*/policy.json")
    assert sentence.endswith(f"read from it before: put the newer copy back, or remove {mark} to accept this one")
    assert _content_of(database) == before
    mark.write_text("{}")
    assert f"{mark} does not say which policy was confirmed last" in _refusal(serve())
    mark.unlink()
    assert _refusal(serve()).endswith("the engine would be started now")


def test_a_start_refuses_an_empty_database_in_place_of_the_one_it_had(
    serve: Callable[[], Result], database: Path, yesterday: Callable[[], None]
) -> None:
    yesterday()
    database.unlink()
    assert "the store is at policy version 0, and version 3 was read from it before" in _refusal(serve())


def test_a_start_refuses_a_clock_that_is_behind_the_policy(
    serve: Callable[[], Result], database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_back = [30.0]
    monkeypatch.setattr(process, "Clock", lambda: Clock(lambda: time.time() - set_back[0]))
    assert _refusal(serve()).endswith("the engine would be started now")
    before = _content_of(database)
    set_back[0] = 3600.0
    sentence = _refusal(serve())
    assert "this machine's clock says " in sentence
    assert sentence.endswith("by 'test': set the clock, or make any change now if that one was made by a wrong clock")
    assert _content_of(database) == before


def test_a_past_that_cannot_be_kept_is_logged_and_ends_nothing(
    real_store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    past = Past(tmp_path / "gone" / "policy.json")
    source = PolicySource(real_store, lambda: LIVE, lease_s=60, poll_s=1, past=past)
    assert source.confirm().tenants
    assert "policy.json cannot be written: No such file or directory" in caplog.text
    (tmp_path / "gone").mkdir()
    past.note(real_store.snapshot())
    past.require(real_store)


def test_what_was_confirmed_is_on_the_disk_before_it_gets_its_name(
    real_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append((path.name, path.read_text() if path.is_file() else ""))

    def replaced(source: Path, target: Path) -> None:
        replace(source, target)
        done.append(("replace", target.read_text()))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    path = tmp_path / "policy.json"
    Past(path).note(real_store.snapshot())
    text = path.read_text()
    assert done == [("policy.new", text), ("replace", text), (tmp_path.name, "")]
