"""Keys to principals: every way in which a header can fail to name a caller."""

from __future__ import annotations

import contextlib
import hashlib
import hmac

import pytest

from flexgate.policies.documents import Expert, KeyRecord, Role, Tenant
from flexgate.policies.snapshot import Snapshot
from flexgate.server.http import auth
from flexgate.server.http.auth import (
    KeyExpired,
    KeyMissing,
    KeyRevoked,
    KeyWrong,
    Principal,
    Unauthenticated,
    WrongRole,
    authenticate,
    require_role,
    require_tenant,
)


def _key(secret: str, role: Role = Role.TENANT, **fields) -> KeyRecord:
    tenant = {"tenant_id": "acme"} if role is Role.TENANT else {}
    digest = hashlib.sha256(secret.encode()).digest()
    return KeyRecord(
        **{"key_id": f"id-{secret}", "sha256": digest, "prefix": "sk", "role": role, "created": 0.0} | tenant | fields
    )


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    return Snapshot.build(
        policy_version=1,
        experts=[Expert(id="public", owner="commons")],
        tenants=[Tenant(id="acme", name="Acme"), Tenant(id="old", name="Old", archived=True)],
        keys=[
            _key("sk-good"),
            _key("sk-admin", Role.ADMIN),
            _key("sk-auditor", Role.AUDITOR),
            _key("sk-owner", Role.OWNER, owner_id="wire"),
            _key("sk-revoked", revoked=50.0),
            _key("sk-expiring", expires=100.0),
            _key("sk-old", tenant_id="old"),
        ],
    )


def test_tenant_key_names_its_tenant(snapshot):
    principal = authenticate(snapshot, "Bearer sk-good", 100.0)
    assert principal == Principal("id-sk-good", Role.TENANT, "acme", None)
    assert require_tenant(principal) == "acme"


def test_owner_key_names_its_owner(snapshot):
    assert authenticate(snapshot, "Bearer sk-owner", 1.0).owner_id == "wire"


@pytest.mark.parametrize("header", ["bearer sk-good", "BEARER sk-good", "Bearer  sk-good "])
def test_scheme_is_case_insensitive(snapshot, header):
    assert authenticate(snapshot, header, 100.0).tenant_id == "acme"


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "sk-good", "Basic sk-good", "Bearer " + "x" * 600],
)
def test_header_without_a_bearer_key_is_missing(snapshot, header):
    with pytest.raises(KeyMissing):
        authenticate(snapshot, header, 100.0)


@pytest.mark.parametrize(
    "header",
    ["Bearer sk-goo", "Bearer sk-good2", "Bearer SK-GOOD", "Bearer sk-gööd", "Bearer sk-good x"],
)
def test_wrong_key(snapshot, header):
    with pytest.raises(KeyWrong):
        authenticate(snapshot, header, 100.0)


def test_lone_surrogate_is_a_wrong_key(snapshot):
    with pytest.raises(KeyWrong):
        authenticate(snapshot, "Bearer sk-\udce4", 100.0)


def test_key_of_an_archived_tenant_is_wrong(snapshot):
    with pytest.raises(KeyWrong):
        authenticate(snapshot, "Bearer sk-old", 100.0)


def test_a_revoked_key_is_refused_whatever_the_time_and_an_expiry_takes_effect_at_its_second(snapshot):
    for now in (49.9, 50.0):
        with pytest.raises(KeyRevoked):
            authenticate(snapshot, "Bearer sk-revoked", now)
    assert authenticate(snapshot, "Bearer sk-expiring", 99.9)
    with pytest.raises(KeyExpired):
        authenticate(snapshot, "Bearer sk-expiring", 100.0)


def test_every_authentication_error_is_unauthenticated():
    assert {KeyMissing, KeyWrong, KeyRevoked, KeyExpired} == set(Unauthenticated.__subclasses__())


@pytest.mark.parametrize("secret", ["sk-admin", "sk-auditor", "sk-owner"])
def test_only_tenant_keys_infer(snapshot, secret):
    with pytest.raises(WrongRole, match="cannot be used for inference"):
        require_tenant(authenticate(snapshot, f"Bearer {secret}", 1.0))


@pytest.mark.parametrize("secret", ["sk-good", "sk-auditor", "sk-owner"])
def test_only_admin_keys_administer(snapshot, secret):
    with pytest.raises(WrongRole):
        require_role(authenticate(snapshot, f"Bearer {secret}", 1.0), Role.ADMIN)
    require_role(authenticate(snapshot, "Bearer sk-admin", 1.0), Role.ADMIN)


@pytest.mark.parametrize("secret", ["sk-good", "sk-nonsense"])
def test_hit_and_miss_compare_once_in_constant_time(snapshot, secret, monkeypatch):
    compared = []
    really_compare = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return really_compare(a, b)

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    with contextlib.suppress(KeyWrong):
        authenticate(snapshot, f"Bearer {secret}", 1.0)
    assert compared == [(32, 32)]


def test_a_record_filed_under_a_wrong_digest_does_not_authenticate(snapshot):
    secret = "sk-other"
    digest = hashlib.sha256(secret.encode()).digest()
    forged = type("Forged", (), {"keys": {digest: _key("sk-good")}, "tenants": snapshot.tenants})()
    with pytest.raises(KeyWrong):
        authenticate(forged, f"Bearer {secret}", 1.0)


def test_errors_do_not_repeat_the_key(snapshot):
    for secret in ("sk-nonsense", "sk-revoked"):
        with pytest.raises(Unauthenticated) as caught:
            authenticate(snapshot, f"Bearer {secret}", 100.0)
        assert secret not in str(caught.value)
