"""Yesterday's database and yesterday's clock: a start refuses what is older than what it has confirmed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from policy_file import LIVE, content_of, refusal, settle
from typer.testing import Result

from flexgate.policies.documents import Tenant
from flexgate.policies.store import Store
from flexgate.server.engine.protocol.clock import Clock
from flexgate.server.lifecycle import bootstrap
from flexgate.server.lifecycle.settings import Settings
from flexgate.server.policy.rollback_guard import RollbackGuard
from flexgate.server.policy.source import PolicySource


@pytest.fixture
def yesterday(database: Path, text_checkpoint: Path, tmp_path: Path) -> Callable[[], None]:
    """Puts back the database as it was before the last change that the server confirmed."""
    settle(database)
    copy = shutil.copy(database, tmp_path / "yesterday.db")
    store = Store.open(f"sqlite:///{database}")
    with store.change(actor="test", at=time.time()) as change:
        change.put(Tenant(id="acme", name="Acme", archived=True))
    _rollback_guard(text_checkpoint, tmp_path).note(store.snapshot())
    store.close()
    settle(database)

    def put_back() -> None:
        shutil.copy(copy, database)

    return put_back


def _rollback_guard(model: Path, tmp_path: Path) -> RollbackGuard:
    return RollbackGuard(Settings(model=model, state_dir=tmp_path / "state").directory() / "policy.json")


def test_a_start_refuses_yesterdays_file_until_it_is_accepted(
    serve: Callable[[], Result], database: Path, yesterday: Callable[[], None], tmp_path: Path
) -> None:
    assert refusal(serve()).endswith("the engine would be started now")
    yesterday()
    before = content_of(database)
    sentence = refusal(serve())
    (mark,) = (tmp_path / "state").glob("served-*/policy.json")
    assert sentence.endswith(f"was served: restore the newer database, or remove {mark} to accept this database")
    assert content_of(database) == before
    mark.write_text("{}")
    assert f"{mark} is damaged" in refusal(serve())
    mark.unlink()
    assert refusal(serve()).endswith("the engine would be started now")


def test_a_start_refuses_an_empty_database_in_place_of_the_one_it_had(
    serve: Callable[[], Result], database: Path, yesterday: Callable[[], None]
) -> None:
    yesterday()
    database.unlink()
    assert "the database went back to policy version 0, after version 3 was served" in refusal(serve())


def test_a_start_refuses_a_clock_that_is_behind_the_policy(
    serve: Callable[[], Result], database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_back = [30.0]
    monkeypatch.setattr(bootstrap, "Clock", lambda: Clock(lambda: time.time() - set_back[0]))
    assert refusal(serve()).endswith("the engine would be started now")
    before = content_of(database)
    set_back[0] = 3600.0
    sentence = refusal(serve())
    assert "this machine's clock says " in sentence
    assert sentence.endswith("by a wrong clock, make another one with 'flexgate policy apply'")
    assert content_of(database) == before


def test_a_version_that_cannot_be_kept_is_logged_and_ends_nothing(
    real_store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rollback_guard = RollbackGuard(tmp_path / "gone" / "policy.json")
    source = PolicySource(real_store, lambda: LIVE, lease_s=60, poll_s=1, rollback_guard=rollback_guard)
    assert source.confirm().tenants
    assert "policy.json cannot be written: No such file or directory" in caplog.text
    (tmp_path / "gone").mkdir()
    rollback_guard.note(real_store.snapshot())
    rollback_guard.require(real_store)


def test_a_version_that_could_not_be_kept_is_kept_at_the_next_poll(
    real_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollback_guard = RollbackGuard(tmp_path / "policy.json")
    source = PolicySource(real_store, lambda: LIVE, lease_s=60, poll_s=1, rollback_guard=rollback_guard)
    before = source.confirm().policy_version
    full = OSError(errno.ENOSPC, "No space left on device")
    fsync = os.fsync

    def on_a_full_disk(descriptor: int) -> None:
        raise full

    monkeypatch.setattr(os, "fsync", on_a_full_disk)
    with real_store.change(actor="test", at=9.0) as change:
        change.put(Tenant(id="acme", name="Acme"))
    source.confirm()
    assert json.loads((tmp_path / "policy.json").read_text())["policy_version"] == before
    monkeypatch.setattr(os, "fsync", fsync)
    source.confirm()
    assert json.loads((tmp_path / "policy.json").read_text())["policy_version"] == before + 1


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
    RollbackGuard(path).note(real_store.snapshot())
    text = path.read_text()
    assert done == [("policy.new", text), ("replace", text), (tmp_path.name, "")]
