"""The demo's world, and that it can be recognised."""

from __future__ import annotations

import pytest

from flexgate.policies.agreements import Agreement
from flexgate.policies.decide import decide
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.documents import Role, Tenant
from flexgate.policies.store.agreements import list_agreements
from flexgate.policies.store.catalogue import ManifestExpert
from flexgate.policies.store.demo import DEMO_KEYS, holds_demo_keys, seed
from flexgate.server.http.auth import WrongRole, authenticate, require_tenant

MANIFEST = [
    ManifestExpert("public", "commons", "general"),
    ManifestExpert("news", "wire", "press"),
    ManifestExpert("math", "institute", "mathematics"),
    ManifestExpert("code", "forge", "programming"),
    ManifestExpert("legal", "forge", "law"),
]


@pytest.fixture
def demo(empty):
    seed(empty, MANIFEST, epoch=1, at=1.0)
    return empty


def _allowed(store, key, **request):
    snapshot = store.snapshot()
    tenant = require_tenant(authenticate(snapshot, f"Bearer {key}", 2.0))
    return decide(snapshot, tenant, DecisionRequest(decision_id="d", **request), 2.0).allowed


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("sk-demo-all", ("public", "news", "math", "code", "legal")),
        ("sk-demo-press", ("public", "news")),
        ("sk-demo-public", ("public",)),
    ],
)
def test_demo_key_opens_what_the_readme_says(demo, key, allowed):
    assert _allowed(demo, key) == allowed
    assert _allowed(demo, key, purpose="ai-input", region="DE") == allowed


def test_every_demo_project_has_limits(demo):
    for tenant in demo.snapshot().tenants.values():
        assert (tenant.quota.concurrent_requests, tenant.quota.requests_per_minute) == (128, 6_000)
        assert tenant.quota.tokens_per_minute == 1_000_000


def test_admin_key_cannot_infer(demo):
    principal = authenticate(demo.snapshot(), "Bearer sk-demo-admin", 2.0)
    assert principal.role is Role.ADMIN
    with pytest.raises(WrongRole):
        require_tenant(principal)


def test_the_owner_of_legal_has_a_key_and_is_paid(demo):
    principal = authenticate(demo.snapshot(), "Bearer sk-demo-owner", 2.0)
    assert (principal.role, principal.owner_id) == (Role.OWNER, "forge")
    paid = {one.id: [duty.kind for duty in one.duties] for one in list_agreements(demo)}
    assert paid == {"demo-forge": ["compensate", "report"], "demo-institute": [], "demo-wire": []}


def test_seeding_again_changes_nothing(demo):
    before = demo.snapshot()
    seed(demo, MANIFEST, epoch=1, at=9.0)
    assert demo.snapshot() == before


def test_seeding_again_keeps_what_an_administrator_changed(demo):
    with demo.change(actor="admin", at=2.0) as change:
        change.remove(Agreement, "demo-wire")
        change.put(Tenant(id="proj_demo_all", name="Renamed"))
    seed(demo, MANIFEST, epoch=1, at=3.0)
    assert demo.snapshot().tenants["proj_demo_all"].name == "Renamed"
    assert _allowed(demo, "sk-demo-press") == ("public",)


def test_expert_new_to_the_demo_comes_without_an_agreement(demo):
    seed(demo, [*MANIFEST, ManifestExpert("medical", "clinic", "medicine")], epoch=1, at=3.0)
    assert "medical" in demo.snapshot().experts
    assert "medical" not in _allowed(demo, "sk-demo-all")


def test_demo_keys_are_recognised(empty):
    assert not holds_demo_keys(empty)
    with empty.change(actor="t", at=1.0) as change:
        change.mint_key(Role.ADMIN)
    assert not holds_demo_keys(empty)
    seed(empty, MANIFEST, epoch=1, at=2.0)
    assert holds_demo_keys(empty)


@pytest.mark.parametrize("secret", DEMO_KEYS)
def test_any_one_demo_key_is_recognised_even_revoked(empty, secret):
    with empty.change(actor="t", at=1.0) as change:
        record = change.add_key(secret, prefix=secret, role=Role.ADMIN)
        change.revoke_key(record.key_id)
    assert holds_demo_keys(empty)
