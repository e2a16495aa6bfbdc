"""What is withheld from a snapshot is gone from decisions, and nothing else is."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import pytest

from flexgate.policies.agreements import Agreement
from flexgate.policies.decide import decide
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.documents import Expert, ExpertSet, KeyRecord, Role, Tenant
from flexgate.policies.errors import RequiredExpertMissing, TenantArchived
from flexgate.policies.ids import TenantId
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.withhold import (
    Withholding,
    listing_only,
    without_agreement,
    without_key,
    without_tenant,
)

OWNERS = {"public": "commons", "news": "gazette", "law": "gazette", "math": "academy"}
ALL = frozenset(OWNERS)


def _agreement(id_: str, owner: str, experts: list[str], effect: str = "permit") -> Agreement:
    terms = {"id": id_, "owner": owner, "experts": experts, "assignee": "everyone", "effect": effect}
    return Agreement.model_validate(terms)


@pytest.fixture
def snapshot() -> Snapshot:
    key: dict[str, Any] = {"prefix": "sk", "created": 0.0}
    sha256 = {secret: hashlib.sha256(secret.encode()).digest() for secret in ("sk-t", "sk-admin")}
    return Snapshot.build(
        policy_version=1,
        experts=[Expert(id=id_, owner=owner) for id_, owner in OWNERS.items()],
        sets=[ExpertSet(id="set:gazette", experts=frozenset({"news", "law"}))],
        tenants=[
            Tenant(id="allowing", name="a", expert_ids=frozenset({"set:gazette", "math"})),
            Tenant(id="denying", name="d", mode="deny_list"),
        ],
        agreements=[_agreement("g", "gazette", ["news", "law"]), _agreement("m", "academy", ["math"])],
        keys=[
            KeyRecord(key_id="k", sha256=sha256["sk-t"], role=Role.TENANT, tenant_id=TenantId("allowing"), **key),
            KeyRecord(key_id="adm", sha256=sha256["sk-admin"], role=Role.ADMIN, **key),
        ],
    )


def _allowed(snapshot: Snapshot, tenant: str) -> set[str]:
    return set(decide(snapshot, tenant, DecisionRequest(decision_id="d"), 1.0).allowed)


@pytest.mark.parametrize(
    ("withholding", "allowing", "denying"),
    [
        (partial(without_agreement, agreement_id="g", owner_id=None), {"public", "math"}, {"public", "math"}),
        (partial(without_agreement, agreement_id="g", owner_id="gazette"), {"public", "math"}, {"public", "math"}),
        (partial(without_agreement, agreement_id="g", owner_id="academy"), ALL, ALL),
        (partial(without_agreement, agreement_id="nonsense", owner_id=None), ALL, ALL),
        (
            partial(listing_only, tenant_id="allowing", mode="allow_list", expert_ids={"math"}),
            {"public", "math"},
            ALL,
        ),
        (partial(listing_only, tenant_id="denying", mode="allow_list", expert_ids={"math"}), ALL, {"public", "math"}),
        (
            partial(listing_only, tenant_id="denying", mode="deny_list", expert_ids={"set:gazette"}),
            ALL,
            {"public", "math"},
        ),
        (partial(listing_only, tenant_id="allowing", mode="deny_list", expert_ids={"law"}), ALL - {"law"}, ALL),
        (partial(listing_only, tenant_id="allowing", mode="allow_list", expert_ids=set()), {"public"}, ALL),
        (partial(listing_only, tenant_id="nonsense", mode="allow_list", expert_ids=set()), ALL, ALL),
        (partial(without_tenant, tenant_id="nonsense"), ALL, ALL),
    ],
)
def test_what_is_withheld_is_allowed_no_more(
    snapshot: Snapshot, withholding: Withholding, allowing: set[str], denying: set[str]
) -> None:
    reduced = withholding(snapshot)
    assert _allowed(reduced, "allowing") == allowing
    assert _allowed(reduced, "denying") == denying


def test_what_takes_nothing_away_returns_the_snapshot_itself(snapshot: Snapshot) -> None:
    archived = without_tenant(snapshot, "denying")
    assert without_tenant(archived, "denying") is archived
    for without in (
        without_agreement(snapshot, "nonsense", owner_id=None),
        without_agreement(snapshot, "g", owner_id="academy"),
        listing_only(snapshot, "allowing", "allow_list", {"set:gazette", "math"}),
    ):
        assert without is snapshot


def test_a_list_that_names_more_gives_nothing_while_it_is_not_stored(snapshot: Snapshot) -> None:
    fewer = listing_only(snapshot, "allowing", "allow_list", {"math"})
    assert _allowed(listing_only(fewer, "allowing", "deny_list", set()), "allowing") == {"public", "math"}


def test_a_prohibition_is_not_withheld(snapshot: Snapshot) -> None:
    ban = _agreement("ban", "academy", ["math"], "prohibit")
    permit = _agreement("m", "academy", ["math"])
    banned = Snapshot.build(
        policy_version=1,
        experts=snapshot.experts.values(),
        tenants=[Tenant(id="denying", name="d", mode="deny_list")],
        agreements=[ban, permit],
    )
    assert _allowed(without_agreement(banned, "ban", owner_id=None), "denying") == {"public"}


def test_what_is_required_stays_so_while_the_end_of_the_requirement_is_not_stored(snapshot: Snapshot) -> None:
    requires = _agreement("must", "academy", ["math"], "require")
    required = Snapshot.build(
        policy_version=1,
        experts=snapshot.experts.values(),
        tenants=[Tenant(id="allowing", name="a")],
        agreements=[requires, _agreement("m", "academy", ["math"])],
    )
    assert _allowed(without_agreement(required, "must", owner_id=None), "allowing") == {"public", "math"}
    with pytest.raises(RequiredExpertMissing):
        _allowed(without_agreement(required, "m", owner_id=None), "allowing")


def test_a_tenant_that_is_withheld_is_like_an_archived_one(snapshot: Snapshot) -> None:
    reduced = without_tenant(snapshot, "denying")
    with pytest.raises(TenantArchived):
        _allowed(reduced, "denying")
    assert _allowed(reduced, "allowing") == ALL


@pytest.mark.parametrize(("key_id", "tenant_id"), [("k", "allowing"), ("adm", None)])
def test_a_key_that_is_withheld_is_revoked_and_no_other(snapshot: Snapshot, key_id: str, tenant_id: str | None) -> None:
    reduced = without_key(snapshot, key_id, tenant_id=tenant_id, now=5.0)
    assert {key.key_id: key.revoked for key in reduced.keys.values() if key.revoked} == {key_id: 5.0}
    assert without_key(snapshot, key_id, tenant_id="denying", now=5.0) is snapshot
