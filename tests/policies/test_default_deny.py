"""Nothing is allowed unless somebody wrote that it is."""

from __future__ import annotations

import math

import pytest

from flexgate.policies.documents import Tenant
from flexgate.policies.errors import (
    ClockInvalid,
    EmptyGate,
    RequiredExpertMissing,
    TenantArchived,
    UnknownTenant,
)


def test_new_tenant_is_allow_list_with_nothing_on_it():
    tenant = Tenant(id="new", name="New")
    assert (tenant.mode, tenant.expert_ids, tenant.anchor_optional) == ("allow_list", set(), False)


def test_new_tenant_gets_public_only_even_when_everything_is_permitted(world):
    decision = world.ask(world.build(world.all_permitted()))
    assert decision.allowed == ("public",)
    assert set(world.codes(decision).values()) == {"not_in_allow_list"}


def test_tenant_without_agreement_gets_public_only_in_either_mode(world):
    for mode, names in (("allow_list", ["news", "math"]), ("deny_list", [])):
        snapshot = world.build(tenants=[world.tenant(mode=mode, expert_ids=names)])
        decision = world.ask(snapshot)
        assert decision.allowed == ("public",)
        assert set(world.codes(decision).values()) == {"no_agreement"}
        assert decision.valid_until == math.inf


def test_unknown_tenant_gets_no_gate(world):
    with pytest.raises(UnknownTenant):
        world.ask(world.build(), who="nobody")


def test_archived_tenant_gets_no_gate(world):
    snapshot = world.build(world.all_permitted(), [world.tenant(mode="deny_list", archived=True)])
    with pytest.raises(TenantArchived):
        world.ask(snapshot)


def test_agreement_with_another_tenant_allows_nothing(world):
    snapshot = world.build(
        world.all_permitted(assignee="tenant:other"),
        [world.tenant(mode="deny_list"), world.tenant(id="other", mode="deny_list")],
    )
    assert world.ask(snapshot).allowed == ("public",)
    assert len(world.ask(snapshot, who="other").allowed) == 5


def test_agreement_with_a_group_reaches_its_members_only(world):
    snapshot = world.build(
        world.all_permitted(assignee="group:press"),
        [
            world.tenant(mode="deny_list"),
            world.tenant(id="member", mode="deny_list", groups=["press"]),
        ],
    )
    assert world.ask(snapshot).allowed == ("public",)
    assert len(world.ask(snapshot, who="member").allowed) == 5


def test_agreement_by_someone_who_does_not_own_the_expert_allows_nothing(world):
    snapshot = world.build(
        [world.agreement(owner="forge", experts=["news", "code"])],
        [world.tenant(mode="deny_list")],
    )
    assert world.ask(snapshot).allowed == ("public", "code")


def test_prohibition_by_someone_who_does_not_own_the_expert_has_no_effect(world):
    snapshot = world.build(
        [*world.all_permitted(), world.agreement("x", owner="forge", effect="prohibit")],
        [world.tenant(mode="deny_list")],
    )
    assert "news" in world.ask(snapshot).allowed


def test_expert_that_is_not_live_is_not_allowed(world):
    experts = [{**e, "live": e["id"] != "math"} for e in world.experts]
    snapshot = world.build(world.all_permitted(), [world.tenant(mode="deny_list")], experts)
    decision = world.ask(snapshot)
    assert decision.allowed == ("public", "news", "code", "legal")
    assert world.codes(decision) == {"math": "not_live"}


def test_limited_permission_does_not_reach_a_request_that_declares_nothing(world):
    terms = [world.agreement(purposes=["ai-input"]), world.agreement("b", regions=["DE"])]
    for one in terms:
        assert world.ask(world.build([one], [world.tenant(mode="deny_list")])).allowed == ("public",)


def test_public_that_is_not_live_is_refused_not_replaced(world):
    experts = [{**e, "live": e["id"] != "public"} for e in world.experts]
    for optional in (False, True):
        snapshot = world.build(
            world.all_permitted(),
            [world.tenant(mode="deny_list", anchor_optional=optional)],
            experts,
        )
        with pytest.raises(RequiredExpertMissing):
            world.ask(snapshot)


def test_empty_gate_is_refused_not_widened(world):
    snapshot = world.build(world.all_permitted(), [world.tenant(anchor_optional=True)])
    with pytest.raises(EmptyGate):
        world.ask(snapshot, ignore=("public",))


def test_nothing_is_decided_at_a_time_that_is_not_a_number(world):
    snapshot = world.build(world.all_permitted(), [world.tenant(mode="deny_list")])
    with pytest.raises(ClockInvalid):
        world.ask(snapshot, now=math.nan)
