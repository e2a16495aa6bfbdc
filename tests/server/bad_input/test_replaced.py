"""A database file, a lock or a memory that is replaced or deleted under a running server is noticed, and nothing is
decided from what no one else sees.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from flexgate.policies.documents import Role
from flexgate.policies.errors import SnapshotStale, StoreReplaced, StoreUnavailable
from flexgate.policies.store import Store
from flexgate.policies.store.database import noting
from flexgate.policies.store.identity import FileIdentity
from flexgate.policies.store.projects import list_projects, update_project
from flexgate.server.lifecycle.settings import load_settings
from flexgate.server.lifecycle.store_settings import SettingsError
from flexgate.server.policy.rollback_guard import RollbackGuard
from flexgate.server.policy.source import PolicySource

Replace = Callable[[Path], None]
LIVE = dict.fromkeys(("public", "news", "math", "secret"), 1)


def _backup_moved_over(path: Path) -> None:
    backup = path.with_suffix(".backup")
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(backup)) as target:
        source.backup(target)
    os.replace(backup, path)


def _directory_swapped(path: Path) -> None:
    aside = path.parent.with_name(f"{path.parent.name}-aside")
    path.parent.rename(aside)
    shutil.copytree(aside, path.parent)


REPLACE = [_backup_moved_over, Path.unlink, _directory_swapped]


@pytest.fixture
def path(real_store: Store) -> Path:
    return Path(real_store.engine.url.database or "")


@pytest.fixture
def source(real_store: Store, path: Path) -> PolicySource:
    source = PolicySource(real_store, lambda: LIVE, lease_s=30.0, poll_s=0.01)
    source.confirm()
    return source


@pytest.mark.parametrize("replace", REPLACE)
@pytest.mark.asyncio
async def test_a_running_server_decides_nothing_once_its_database_was_replaced(
    real_store: Store, source: PolicySource, path: Path, replace: Replace, caplog: pytest.LogCaptureFixture
) -> None:
    assert (await source.current()).tenants["t"].named == {"news", "secret"}
    replace(path)
    if path.exists():  # what is taken away there never reaches the running server, whose file has no name any more
        with closing(Store.open(f"sqlite:///{path}")) as other:
            update_project(other, "t", {"mode": "allow_list", "expert_ids": []}, actor="cli", at=10.0)
    with caplog.at_level(logging.ERROR):
        polling = asyncio.create_task(source.run())
        async with asyncio.timeout(10):  # the lease lasts for longer
            while source.fresh():
                await asyncio.sleep(0.001)
        for _ in range(100):
            with pytest.raises(SnapshotStale):
                await source.current()
        polling.cancel()
    assert not source.fresh()
    (said,) = [record.getMessage() for record in caplog.records if "does not answer" in record.getMessage()]
    assert f"the database {path} was replaced or deleted while it was in use: restart the server" in said


@pytest.mark.parametrize("replace", REPLACE)
def test_no_change_is_made_once_the_database_was_replaced(real_store: Store, path: Path, replace: Replace) -> None:
    before = list_projects(real_store)
    replace(path)
    with pytest.raises(StoreReplaced):
        update_project(real_store, "t", {"name": "lost"}, actor="a", at=10.0)
    if path.exists():
        with closing(Store.open(f"sqlite:///{path}")) as other:
            assert list_projects(other) == before


@pytest.mark.parametrize("replace", REPLACE)
def test_a_change_is_not_acknowledged_whose_file_lost_its_name_before_it_was_committed(
    real_store: Store, path: Path, replace: Replace
) -> None:
    def change_meanwhile() -> None:
        with real_store.change(actor="a", at=10.0) as change:
            change.mint_key(Role.ADMIN)
            replace(path)

    with pytest.raises(StoreReplaced):
        change_meanwhile()


@pytest.mark.parametrize("replace", REPLACE)
def test_a_process_is_not_announced_in_a_file_that_lost_its_name_before_the_commit(
    real_store: Store, path: Path, replace: Replace
) -> None:
    def announce_meanwhile() -> None:
        with noting(real_store.engine):
            replace(path)

    with pytest.raises(StoreReplaced):
        announce_meanwhile()


URIS = ["sqlite:///file:{path}?uri=true", "sqlite:///file::memory:?uri=true", "sqlite:///{path}?uri=false&mode=memory"]


@pytest.mark.parametrize("uri", URIS)
def test_a_database_whose_file_cannot_be_compared_is_refused(path: Path, uri: str, tmp_path: Path) -> None:
    url = uri.format(path=path)
    with pytest.raises(StoreUnavailable, match="SQLite's 'file:' URIs are not used: write the path of the file itself"):
        Store.open(url)
    with pytest.raises(SettingsError, match="--database-url: SQLite's 'file:' URIs are not used"):
        load_settings(model=tmp_path, database_url=url)


def test_a_file_that_is_not_there_is_not_taken_for_the_right_one(tmp_path: Path) -> None:
    file = FileIdentity(tmp_path / "gone", "the database")
    with pytest.raises(StoreReplaced, match="gone disappeared after it was opened"):
        file.take()


def test_no_empty_database_is_made_where_one_was_deleted(real_store: Store, path: Path) -> None:
    real_store.version()
    path.unlink()
    real_store.close()  # the next connection is a new one
    with pytest.raises(StoreReplaced):
        real_store.version()
    assert not path.exists()


def test_the_very_file_put_back_is_used_again(source: PolicySource, path: Path) -> None:
    aside = path.with_suffix(".aside")
    path.rename(aside)
    with pytest.raises(StoreReplaced):
        source.confirm()
    aside.rename(path)
    assert source.confirm().policy_version
    assert source.fresh()


@pytest.mark.parametrize("replace", [Path.unlink, _directory_swapped])
def test_a_lock_that_was_replaced_stops_decisions(real_store: Store, tmp_path: Path, replace: Replace) -> None:
    lock = tmp_path / "served" / "lock"
    lock.parent.mkdir()
    lock.touch()
    file = FileIdentity(lock, "the lock of the state directory")
    file.take()
    source = PolicySource(real_store, lambda: LIVE, lease_s=30.0, poll_s=0.01, require_files=file.require)
    source.confirm()
    replace(lock)
    with pytest.raises(StoreReplaced, match="the lock of the state directory"):
        source.confirm()
    assert not source.fresh()


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_memory_that_was_deleted_or_replaced_is_written_again(
    real_store: Store, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "policy.json"
    source = PolicySource(real_store, lambda: LIVE, lease_s=30.0, poll_s=0.01, rollback_guard=RollbackGuard(path))
    source.confirm()
    kept = path.read_text()
    path.rename(tmp_path / "moved.json")
    if content is not None:
        path.write_text(content)
    source.confirm()
    assert path.read_text() == kept
