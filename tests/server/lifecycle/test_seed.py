"""The policy store at start."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from flexgate.policies.documents import Role
from flexgate.policies.errors import ChangeRefused
from flexgate.policies.store.catalogue import ManifestExpert
from flexgate.policies.store.store import Store
from flexgate.server.http.auth import authenticate
from flexgate.server.lifecycle.seed import (
    DemoKeysFound,
    ManifestRefused,
    first_admin_key,
    owner_id,
    prepare,
    prepare_demo,
)

EXPERTS = [ManifestExpert("public", "commons", "all"), ManifestExpert("news", "gazette", "news")]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(f"sqlite:///{tmp_path / 'x.db'}")


def test_a_first_start_makes_one_admin_key_and_permits_nothing(store: Store) -> None:
    prepare(store, EXPERTS, epoch=1, at=time.time())
    secret = first_admin_key(store, at=time.time())
    assert secret is not None
    snapshot = store.snapshot()
    assert authenticate(snapshot, f"Bearer {secret}", time.time()).role is Role.ADMIN
    assert not snapshot.tenants
    assert list(snapshot.experts) == ["public", "news"]


def test_a_second_start_shows_no_key(store: Store) -> None:
    prepare(store, EXPERTS, epoch=1, at=time.time())
    assert first_admin_key(store, at=time.time()) is not None
    prepare(store, EXPERTS, epoch=1, at=time.time())
    assert first_admin_key(store, at=time.time()) is None


def test_a_start_without_a_required_expert_is_refused_unless_it_was_revoked(store: Store) -> None:
    """A revoked one is added again while the server runs; a checkpoint without one would never answer."""
    safe = ManifestExpert("safe", "lab", "safety", required=True)
    prepare(store, [*EXPERTS, safe], epoch=1, at=1.0)
    refused = "^every request requires expert 'safe', which this checkpoint does not have: serve one that has it, or"
    with pytest.raises(ChangeRefused, match=refused):
        prepare(store, EXPERTS, epoch=1, at=2.0)
    assert store.snapshot().experts["safe"].live  # type: ignore[index]
    with store.change(actor="admin", at=3.0) as change:
        epoch = change.revoke_weights("safe", slot=2, detail={})
    prepare(store, EXPERTS, epoch=epoch, at=4.0)
    assert not store.snapshot().experts["safe"].live  # type: ignore[index]


def test_a_normal_start_refuses_a_store_with_demo_keys(store: Store) -> None:
    prepare_demo(store, EXPERTS, epoch=1, at=time.time())
    version = store.version()
    with pytest.raises(DemoKeysFound, match="--demo"):
        prepare(store, EXPERTS, epoch=1, at=time.time())
    assert store.version() == version


def test_the_demo_store_has_the_demo_tenants(store: Store) -> None:
    prepare_demo(store, EXPERTS, epoch=1, at=time.time())
    snapshot = store.snapshot()
    now = time.time()
    for secret in ("sk-demo-all", "sk-demo-press", "sk-demo-public"):
        assert authenticate(snapshot, f"Bearer {secret}", now).tenant_id in snapshot.tenants
    assert authenticate(snapshot, "Bearer sk-demo-admin", now).role is Role.ADMIN


@pytest.mark.parametrize(
    ("name", "id_"),
    [
        ("gazette", "gazette"),
        ("Gazette_1.x", "Gazette_1.x"),
        ("Tarnholm Gazette", "tarnholm-gazette"),
        ("  Ó & Söhne!  ", "s-hne"),
        ("x" * 80, "x" * 63),
    ],
)
def test_an_owners_name_becomes_an_id(name: str, id_: str) -> None:
    assert owner_id(name) == id_


@pytest.mark.parametrize("owners", [("The Press", "the press"), ("the-press", "The Press"), ("!", "x")])
def test_owners_that_cannot_be_told_apart_are_refused(store: Store, owners: tuple[str, str]) -> None:
    experts = [EXPERTS[0], ManifestExpert("news", owners[0], ""), ManifestExpert("math", owners[1], "")]
    with pytest.raises(ManifestRefused):
        prepare(store, experts, epoch=1, at=time.time())
    with pytest.raises(ManifestRefused):
        prepare_demo(store, experts, epoch=1, at=time.time())
