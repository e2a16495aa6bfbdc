"""An expert without an owner needs no agreement and can have none: only projects' lists decide about it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from flexgate.policies.decision import DecisionRequest
from flexgate.policies.documents import Expert
from flexgate.policies.explain import explain

CODE = {"id": "code", "owner": None}
EXPERTS = [{"id": "public", "owner": None}, {"id": "news", "owner": "wire"}, CODE]


@pytest.mark.parametrize(
    ("tenant", "allowed", "code"),
    [
        ({}, ("public",), "not_in_allow_list"),
        ({"expert_ids": ["code"]}, ("public", "code"), None),
        ({"mode": "deny_list"}, ("public", "code"), None),
        ({"mode": "deny_list", "expert_ids": ["code"]}, ("public",), "in_deny_list"),
    ],
)
def test_the_projects_list_decides(world, tenant, allowed, code):
    decision = world.ask(world.build(tenants=[world.tenant(**tenant)], experts=EXPERTS))
    assert decision.allowed == allowed
    assert world.codes(decision).get("code") == code
    assert world.codes(decision)["news"] == "no_agreement"


@pytest.mark.parametrize("effect", ["permit", "prohibit"])
@pytest.mark.parametrize("mode", ["allow_list", "deny_list"])
def test_no_agreement_touches_it(world, mode, effect):
    """Not even one that a policy from before it lost its owner still has."""
    agreements = [world.agreement(owner="wire", experts=["code", "news"], effect=effect)]
    tenants = [world.tenant(mode=mode)]
    with_them = world.ask(world.build(agreements, tenants, EXPERTS))
    without = world.ask(world.build([], tenants, EXPERTS))
    assert ("code" in with_them.allowed) == ("code" in without.allowed) == (mode == "deny_list")


@pytest.mark.parametrize("mode", ["allow_list", "deny_list"])
def test_no_agreement_requires_it(world, mode):
    agreements = [world.agreement(owner="wire", experts=["code"], effect="require")]
    tenants = [world.tenant(mode=mode)]
    decision = world.ask(world.build(agreements, tenants, EXPERTS))
    assert decision == world.ask(world.build([], tenants, EXPERTS))
    assert decision.required == {"public"}


def test_explanations_say_that_it_has_no_owner(world):
    snapshot = world.build(tenants=[world.tenant(mode="deny_list")], experts=EXPERTS)
    explained = {e.expert: e for e in explain(snapshot, "acme", DecisionRequest(decision_id="d"), world.now).experts}
    assert explained["code"].permitted_by == ("unowned",)
    assert explained["public"].permitted_by == ("anchor",)


def test_an_expert_is_never_without_an_owner_by_oversight():
    with pytest.raises(ValidationError, match="owner"):
        Expert.model_validate({"id": "code"})
