"""A snapshot is built whole and consistent, or not at all."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from flexgate.policies.documents import Expert, KeyRecord, Role, Tenant
from flexgate.policies.errors import SnapshotInvalid
from flexgate.policies.snapshot import Snapshot

KEY = KeyRecord(key_id="k", sha256=b"1" * 32, prefix="sk-1", role=Role.TENANT, tenant_id="acme", created=0.0)


def test_equal_documents_count_once(world):
    once = world.build(world.all_permitted(), [world.tenant(mode="deny_list")])
    twice = world.build(world.all_permitted() * 2, [world.tenant(mode="deny_list")] * 2)
    assert world.ask(once) == world.ask(twice)


@pytest.mark.parametrize(
    "broken",
    [
        {"agreements": [{}, {"version": 2}]},
        {"agreements": [{"experts": ["nonsense"]}]},
        {"agreements": [{"experts": ["set:nonsense"]}]},
        {"tenants": [{"expert_ids": ["nonsense"]}]},
        {"tenants": [{"hidden": ["nonsense"]}]},
        {"tenants": [{"listed": ["nonsense"]}]},
        {"tenants": [{"default_experts": ["nonsense"]}]},
        {"tenants": [{}, {"name": "Other"}]},
        {"sets": [{"id": "set:x", "experts": ["nonsense"]}]},
        {"experts": [{"id": "news", "owner": "wire"}]},
        {"experts": [{"id": "public", "owner": "commons", "visibility": "hidden"}]},
    ],
)
def test_documents_that_do_not_fit_are_refused(world, broken):
    make = {"agreements": world.agreement, "tenants": world.tenant}
    documents = {field: [make[field](**d) if field in make else d for d in values] for field, values in broken.items()}
    with pytest.raises(SnapshotInvalid):
        world.build(**documents)


@pytest.mark.parametrize(
    "changes",
    [
        {"tenant_id": None},
        {"tenant_id": "nobody"},
        {"role": Role.ADMIN},
        {"role": Role.OWNER, "tenant_id": None},
        {"owner_id": "wire"},
    ],
)
def test_keys_that_do_not_fit_are_refused(world, changes):
    snapshot = world.build()
    with pytest.raises(SnapshotInvalid):
        Snapshot.build(
            policy_version=1,
            experts=snapshot.experts.values(),
            tenants=[],
            keys=[replace(KEY, **changes)],
        )


def test_two_keys_with_one_digest_are_refused():
    admin = replace(KEY, role=Role.ADMIN, tenant_id=None)
    with pytest.raises(SnapshotInvalid):
        Snapshot.build(
            policy_version=1,
            experts=[Expert(id="public", owner="commons")],
            keys=[admin, replace(admin, key_id="other")],
        )


def test_snapshot_is_immutable(world):
    snapshot = world.build(world.all_permitted())
    for collection in ("experts", "tenants", "sets", "agreements", "keys"):
        with pytest.raises(TypeError):
            getattr(snapshot, collection)["x"] = None
    with pytest.raises(FrozenInstanceError):
        snapshot.policy_version = 8


def test_keys_that_fit_are_found_by_their_digest(world):
    snapshot = world.build()
    keys = [
        KEY,
        replace(KEY, key_id="a", sha256=b"2" * 32, role=Role.ADMIN, tenant_id=None),
        replace(KEY, key_id="o", sha256=b"3" * 32, role=Role.OWNER, tenant_id=None, owner_id="wire"),
    ]
    built = Snapshot.build(
        policy_version=1,
        experts=snapshot.experts.values(),
        tenants=[Tenant.model_validate(world.tenant())],
        keys=[*keys, KEY],
    )
    assert built.keys == {key.sha256: key for key in keys}


def test_agreements_are_kept_apart_by_what_limits_them(world):
    snapshot = world.build(
        [
            world.agreement("free"),
            world.agreement("all", purposes=["all"]),
            world.agreement("ban", effect="prohibit"),
            world.agreement("where", regions=["DE"]),
            world.agreement("until", not_after="2030-01-01T00:00:00Z"),
            world.agreement("from", not_before="2020-01-01T00:00:00Z"),
        ]
    )
    unlimited = [agreement.agreement_id for agreement in snapshot.agreements["everyone"].unlimited["news"]]
    limited = [agreement.agreement_id for agreement in snapshot.agreements["everyone"].limited["news"]]
    assert unlimited == ["all", "free"]
    assert limited == ["ban", "until", "where", "from"]
    assert snapshot.agreements["everyone"].dates == (1577836800.0, 1893456000.0)
