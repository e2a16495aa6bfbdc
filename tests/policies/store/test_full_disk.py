"""On a disk without any room, rights are still taken away; nothing else is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from smalldisk import SmallDisk, mounted

from flexgate.policies.audit import Event
from flexgate.policies.documents import Expert, Role, Tenant
from flexgate.policies.errors import StoreFull, StoreUnavailable
from flexgate.policies.store import Store, gitops, history
from flexgate.policies.store.accounts import (
    create_admin_key,
    create_service_account,
    revoke_admin_key,
    revoke_project_key,
)
from flexgate.policies.store.agreements import create_agreement, revise_agreement, terminate_agreement
from flexgate.policies.store.decision_samples import CountedSample, DecisionSample, add_samples
from flexgate.policies.store.gitops import PolicyFile
from flexgate.policies.store.projects import archive_project, create_project, update_project
from flexgate.policies.store.replicas import Process, announce
from flexgate.policies.store.reserve import RESERVED_BYTES

BY = {"actor": "admin", "at": 10.0}
FILE = PolicyFile.model_validate({"format": "flexgate-policy/v1", "hidden_experts": ["news"]})
TERMS = {"id": "a", "owner": "wire", "experts": ["news"], "assignee": "tenant:t", "effect": "permit"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with mounted(tmp_path / "disk", 32) as disk:
        yield disk


@pytest.fixture
def store(disk: SmallDisk) -> Iterator[Store]:
    """A store as a running server holds it, on a disk that has been filled since."""
    with closing(Store.open(f"sqlite:///{disk.path}/policy.db")) as store:
        store.migrate()
        with store.change(actor="setup", at=1.0) as change:
            change.put(Expert(id="public", owner="commons"))
            change.put(Expert(id="news", owner="wire"))
            change.put(Tenant(id="t", name="t", expert_ids=frozenset({"news"})))
        create_agreement(store, TERMS, **BY)
        _, store.key = create_service_account(store, "t", "robot", **BY)  # type: ignore[attr-defined]
        store.admin = create_admin_key(store, "second", **BY)  # type: ignore[attr-defined]
        create_admin_key(store, "first", **BY)
        disk.fill()
        yield store


def _revoke_expert(store: Any) -> None:
    with store.change(**BY, urgent=True) as change:
        change.put(Expert(id="news", owner="wire", live=False))
        change.revoke_weights("news", slot=1, detail={})


TAKEN: dict[str, Callable[[Any], object]] = {
    "expert": _revoke_expert,
    "agreement ended": lambda store: terminate_agreement(store, "a", **BY),
    "agreement narrowed": lambda s: revise_agreement(s, "a", {**TERMS, "purposes": ["search"]}, **BY),
    "prohibition": lambda s: create_agreement(s, {**TERMS, "id": "b", "effect": "prohibit"}, **BY),
    "permission": lambda store: update_project(store, "t", {"expert_ids": []}, **BY),
    "key": lambda store: revoke_project_key(store, "t", store.key.record.key_id, **BY),
    "admin key": lambda store: revoke_admin_key(store, store.admin.record.key_id, **BY),
    "project": lambda store: archive_project(store, "t", **BY),
    "policy file": lambda s: gitops.apply(s, FILE, **BY),
    "rollback": lambda store: history.roll_back(store, 1, confirm=store.version(), **BY),
}
GIVEN: dict[str, Callable[[Any], object]] = {
    "agreement": lambda store: create_agreement(store, {**TERMS, "id": "b"}, **BY),
    "project": lambda store: create_project(store, "new", **BY),
    "key": lambda store: create_service_account(store, "t", "new", **BY),
    "admin key": lambda store: create_admin_key(store, "new", **BY),
    "denial": lambda store: store.record([Event(at=1.0, actor="k", action="request.denied", detail={})]),
    "sample": lambda s: add_samples(s.engine, [CountedSample(DecisionSample("t", None, None, None, ()), 1, 1.0)]),
}


@pytest.mark.parametrize("taken", TAKEN)
def test_a_right_is_taken_away_on_a_full_disk(store: Store, taken: str) -> None:
    version = store.version()
    TAKEN[taken](store)
    with closing(Store.open(str(store.engine.url))) as other:
        assert other.version() == version + 1
        assert other.verify_audit().heads == store.audit_heads()
        assert other.snapshot() == store.snapshot()


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("left", [0, RESERVED_BYTES - 65536])
def test_nothing_else_is_written_once_the_room_is_short(store: Store, disk: SmallDisk, given: str, left: int) -> None:
    disk.free()
    disk.fill(left)
    version, head = store.version(), store.audit_heads()
    with pytest.raises(StoreFull, match="less than 8 MiB left, which are kept for revocations"):
        GIVEN[given](store)
    assert (store.version(), store.audit_heads()) == (version, head)
    disk.free()
    GIVEN[given](store)


def test_the_reserve_is_enough_for_fifty_changes_and_announcing_them(store: Store) -> None:
    for number in range(50):
        update_project(store, "t", {"expert_ids": ["news"] if number % 2 else []}, **BY)
        announce(store.engine, Process("p", store.version(), 2.0), at=float(number))
    assert store.verify_audit().heads == store.audit_heads()


def _change_for_ever(store: Store) -> None:
    for number in range(2_000):
        update_project(store, "t", {"expert_ids": ["news"] if number % 2 else []}, **BY)


def test_what_is_left_when_the_reserve_is_used_up_is_whole(store: Store, disk: SmallDisk) -> None:
    before = store.version()
    with pytest.raises(StoreUnavailable, match="full"):
        _change_for_ever(store)
    assert store.version() - before >= 50
    assert store.verify_audit().heads == store.audit_heads()
    disk.free()
    archive_project(store, "t", **BY)


def test_a_process_that_starts_anew_on_the_full_disk_has_what_was_taken(store: Store) -> None:
    archive_project(store, "t", **BY)
    store.close()  # the log keeps what could not go into the database, and its room
    with closing(Store.open(str(store.engine.url))) as again:
        again.migrate()
        announce(again.engine, Process("p", 0, 2.0), at=1.0)
        assert again.snapshot().tenants["t"].archived
        revoke_admin_key(again, next(key.key_id for key in again.keys() if key.role is Role.ADMIN), **BY)


def test_nothing_is_read_where_the_disk_was_filled_while_nothing_ran(store: Store, disk: SmallDisk) -> None:
    disk.free()
    store.close()
    disk.fill()
    with closing(Store.open(str(store.engine.url))) as again, pytest.raises(StoreUnavailable):
        again.migrate()
