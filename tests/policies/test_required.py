"""No request, list or set of a tenant leaves out an expert that the operator marked as required for the server."""

from __future__ import annotations

import pytest

from flexgate.policies.cache import DecisionCache
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.errors import ExpertRequired, RequiredExpertMissing

SAFE = {"id": "safe", "owner": "lab", "required": True}
PERMIT_SAFE = {"id": "p-safe", "owner": "lab", "experts": ["safe"], "assignee": "everyone", "effect": "permit"}
SETS = [{"id": "set:all", "experts": ["news", "safe"]}, {"id": "set:news", "experts": ["news"]}]


@pytest.fixture
def ask(world):
    """Ask as a tenant with these fields of a server that requires `safe`."""

    def decide(expert=SAFE, permit=PERMIT_SAFE, tenant=None, **request):
        snapshot = world.build(
            agreements=[*world.all_permitted(), *([permit] if permit else [])],
            experts=[*world.experts, expert],
            sets=SETS,
            tenants=[world.tenant(**(tenant or {}))],
        )
        decision = world.ask(snapshot, **request)
        cached = DecisionCache().decide(snapshot, "acme", DecisionRequest(decision_id="dec_1", **request), world.now)
        assert cached == decision
        return decision

    return decide


DOORS = {
    "an allow list without it": ({}, {}),
    "an allow list of others": ({"expert_ids": ["news"]}, {}),
    "a deny list that names it": ({"mode": "deny_list", "expert_ids": ["safe"]}, {}),
    "a deny list that names a set with it": ({"mode": "deny_list", "expert_ids": ["set:all"]}, {}),
    "a default expert set without it": ({"mode": "deny_list", "default_experts": ["news"]}, {}),
    "only, empty": ({"mode": "deny_list"}, {"only": ()}),
    "only another one": ({"mode": "deny_list"}, {"only": ("news",)}),
    "only a set without it": ({"mode": "deny_list"}, {"only": ("set:news",)}),
    "an optional anchor that is ignored": ({"anchor_optional": True}, {"ignore": ("public",)}),
    "another one ignored": ({"mode": "deny_list"}, {"ignore": ("news",)}),
}


@pytest.mark.parametrize("door", DOORS)
def test_it_takes_part_whatever_is_left_out(ask, door):
    tenant, request = DOORS[door]
    decision = ask(tenant=tenant, **request)
    assert "safe" in decision.allowed
    assert "safe" not in {reason.expert for reason in decision.excluded}


@pytest.mark.parametrize("names", [("safe",), ("set:all",), ("news", "safe")])
def test_a_request_that_ignores_it_is_refused(ask, names):
    with pytest.raises(ExpertRequired) as refused:
        ask(tenant={"mode": "deny_list"}, ignore=names)
    assert refused.value.param == "flexgate.experts.ignore"
    assert str(refused.value).startswith(
        "'flexgate.experts.ignore' names 'safe', which every request to this server uses."
    )


@pytest.mark.parametrize(
    ("expert", "permit", "why"),
    [
        ({**SAFE, "live": False}, PERMIT_SAFE, "Expert 'safe' is not loaded on this server."),
        (SAFE, None, "No agreement permits this project to use expert 'safe'."),
        (SAFE, {**PERMIT_SAFE, "effect": "prohibit"}, "prohibits this project from using expert 'safe'"),
        (SAFE, {**PERMIT_SAFE, "not_after": "2026-01-01T00:00:00Z"}, "permitted expert 'safe' until"),
    ],
)
@pytest.mark.parametrize("only", [None, (), ("news",)])
def test_nothing_is_answered_without_it(ask, expert, permit, why, only):
    with pytest.raises(RequiredExpertMissing) as refused:
        ask(expert, permit, tenant={"mode": "deny_list"}, only=only)
    assert why in str(refused.value)


@pytest.mark.parametrize("tenant", [{"hidden": ["safe"]}, {"hidden": ["set:all"]}])
@pytest.mark.parametrize("visibility", ["listed", "hidden"])
def test_it_cannot_be_hidden_for_it_is_in_every_answer(ask, tenant, visibility):
    assert "safe" in ask({**SAFE, "visibility": visibility}, tenant=tenant).allowed


def test_the_decision_ends_when_its_permission_does(ask):
    decision = ask(permit={**PERMIT_SAFE, "not_after": "2027-06-01T00:00:00Z"}, only=())
    assert decision.valid_until == 1811808000.0
