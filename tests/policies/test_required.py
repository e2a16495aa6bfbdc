"""No request, list or set of a tenant leaves out an expert that is required, of the server or by an agreement."""

from __future__ import annotations

import pytest

from flexgate.policies.cache import DecisionCache
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.errors import ExpertDenied, ExpertRequired, RequiredExpertMissing, UnknownExpert
from flexgate.policies.explain import explain

SAFE = {"id": "safe", "owner": "lab"}
PERMIT_SAFE = {"id": "p-safe", "owner": "lab", "experts": ["safe"], "assignee": "everyone", "effect": "permit"}
SETS = [
    {"id": "set:all", "experts": ["news", "safe"]},
    {"id": "set:news", "experts": ["news"]},
    {"id": "set:safe", "experts": ["safe"]},
]


REQUIRED_BY = {
    "the server": {},
    "an agreement with everyone": {"assignee": "everyone"},
    "an agreement with a group": {"assignee": "group:labs"},
    "an agreement with the tenant": {"assignee": "tenant:acme"},
    "an agreement that names a set": {"experts": ["set:safe"]},
    "an agreement for any purpose and region": {"purposes": ["search"], "regions": ["DE"]},
}
WORDS = {"the server": "every request to this server uses"}


@pytest.fixture(params=REQUIRED_BY)
def by(request):
    return request.param


@pytest.fixture
def ask(world, by):
    """Ask as a tenant with these fields, for whose requests `safe` is required."""
    fields = {"experts": ["safe"], "effect": "require", **REQUIRED_BY[by]}
    requires = [] if by == "the server" else [world.agreement("r-safe", owner="lab", **fields)]

    def decide(expert=SAFE, permit=PERMIT_SAFE, tenant=None, **request):
        snapshot = world.build(
            agreements=[*world.all_permitted(), *([permit] if permit else []), *requires],
            experts=[*world.experts, {**expert, "required": by == "the server"}],
            sets=SETS,
            tenants=[world.tenant(groups=["labs"], **(tenant or {}))],
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
def test_a_request_that_ignores_it_is_refused(ask, by, names):
    with pytest.raises(ExpertRequired) as refused:
        ask(tenant={"mode": "deny_list"}, ignore=names)
    assert refused.value.param == "flexgate.experts.ignore"
    who = WORDS.get(by, "agreement 'r-safe' (version 1) requires")
    assert str(refused.value) == f"'flexgate.experts.ignore' names 'safe', which {who}. Remove it from there."


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
def test_it_cannot_be_hidden_for_answers_name_it(ask, tenant, visibility):
    assert "safe" in ask({**SAFE, "visibility": visibility}, tenant=tenant).allowed


@pytest.mark.parametrize("hidden", [{"hidden": ["safe"]}, {"hidden": ["set:all"]}], ids=str)
def test_a_requirement_that_has_ended_shows_no_hidden_expert(world, iso, hidden):
    def refused(now, terms):
        snapshot = world.build(
            [*world.all_permitted(), world.agreement("r", owner="lab", experts=["safe"], effect="require", **terms)],
            [world.tenant(**hidden)],
            [*world.experts, SAFE],
            sets=SETS,
        )
        try:
            world.ask(snapshot, only=("safe",), now=now)
        except UnknownExpert:
            return True
        except (RequiredExpertMissing, ExpertDenied):
            return False
        raise AssertionError("nothing permits it")

    ended = {"not_after": iso(2000)}
    assert not refused(1999, ended)
    assert refused(2000, ended)
    assert not refused(1999, {"not_before": iso(2000)})


def test_the_decision_ends_when_its_permission_does(ask):
    decision = ask(permit={**PERMIT_SAFE, "not_after": "2027-06-01T00:00:00Z"}, only=())
    assert decision.valid_until == 1811808000.0


def _world(world, *terms, **tenant):
    permit = [*world.all_permitted(), PERMIT_SAFE]
    requires = [
        world.agreement(f"r{n}", owner="lab", experts=["safe"], effect="require", **t) for n, t in enumerate(terms)
    ]
    fields = {"purposes": ["ai-input", "search", "x-lab"], "regions": ["DE", "US"], **tenant}
    return world.build([*permit, *requires], [world.tenant(**fields)], [*world.experts, SAFE])


@pytest.mark.parametrize(
    ("terms", "declared", "applies"),
    [
        ({"purposes": ["search"]}, {"purpose": "search"}, True),
        ({"purposes": ["all"]}, {"purpose": "search"}, True),
        ({"purposes": ["ai-all"]}, {"purpose": "ai-input"}, True),
        ({"purposes": ["search"]}, {"purpose": "ai-input"}, False),
        ({"purposes": ["search"]}, {}, True),
        ({"regions": ["EU"]}, {"region": "DE"}, True),
        ({"regions": ["EU"]}, {"region": "US"}, False),
        ({"regions": ["EU"]}, {"purpose": "search"}, True),
        ({"assignee": "tenant:other"}, {}, False),
        ({"assignee": "group:labs"}, {}, False),
    ],
)
def test_a_requirement_applies_where_it_touches_what_is_declared(world, terms, declared, applies):
    decision = world.ask(_world(world, terms), **declared)
    assert ("safe" in decision.allowed) is applies
    assert decision.required == ({"public", "safe"} if applies else {"public"})


def test_a_requirement_that_begins_ends_the_decisions_without_it(world, iso):
    snapshot = _world(world, {"not_before": iso(2000.0), "not_after": iso(3000.0)}, mode="deny_list")
    assert world.ask(snapshot, now=1000.0, only=()).valid_until == 2000.0
    assert world.ask(snapshot, now=1000.0, ignore=("safe",)).valid_until == 2000.0
    with_it = world.ask(snapshot, now=1000.0, only=("safe",))
    assert with_it.valid_until == float("inf")
    assert world.ask(snapshot, now=3000.0, only=()).valid_until == float("inf")


def test_an_expert_of_no_list_goes_when_the_last_of_its_requirements_does(world, iso):
    terms = [{"not_after": iso(2000.0)}, {"not_before": iso(1500.0), "not_after": iso(2500.0)}]
    later = {"not_before": iso(2600.0)}
    decision = world.ask(_world(world, *terms, later), now=1000.0)
    assert ("safe" in decision.allowed, decision.valid_until) == (True, 2500.0)
    assert "safe" not in world.ask(_world(world, *terms, later), now=2500.0).allowed
    listed = world.ask(_world(world, *terms, later, expert_ids=["safe"]), now=1000.0)
    assert listed.valid_until == float("inf")


@pytest.mark.parametrize(("tenant", "only"), [({}, ()), ({}, ("news",)), ({"default_experts": ["news"]}, None)])
def test_an_expert_that_a_request_does_not_want_goes_when_its_requirement_does(world, iso, tenant, only):
    snapshot = _world(world, {"not_after": iso(2000.0)}, expert_ids=["safe", "news"], **tenant)
    decision = world.ask(snapshot, now=1000.0, only=only)
    assert ("safe" in decision.allowed, decision.valid_until) == (True, 2000.0)
    assert "safe" not in world.ask(snapshot, now=2000.0, only=only).allowed
    assert world.ask(snapshot, now=1000.0, only=("safe",)).valid_until == float("inf")


def test_an_explanation_names_what_requires_an_expert(world):
    snapshot = _world(world, {}, {"assignee": "tenant:acme", "purposes": ["search"]}, {"assignee": "tenant:other"})
    request = DecisionRequest(decision_id="d")
    found = {one.expert: one.required_by for one in explain(snapshot, "acme", request, world.now).experts}
    assert found == {
        "public": ("expert/required",),
        "safe": ("agreement/r0@1", "agreement/r1@1"),
        **dict.fromkeys(("news", "math", "code", "legal"), ()),
    }
