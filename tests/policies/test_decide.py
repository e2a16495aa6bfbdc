"""Which experts a request may use: agreements, mode, request filter, visibility."""

from __future__ import annotations

import math

import pytest

from flexgate.policies.decision import AllowedExperts
from flexgate.policies.errors import (
    ContextRefused,
    ExpertDenied,
    ExpertRequired,
    UnknownExpert,
)


@pytest.fixture
def open_world(world):
    """Everything permitted, and a tenant that takes everything."""
    return world.build(world.all_permitted(), [world.tenant(mode="deny_list")])


def test_deny_list_allows_every_permitted_expert(world, open_world):
    decision = world.ask(open_world)
    assert decision.allowed == ("public", "news", "math", "code", "legal")
    assert decision.excluded == ()
    assert (decision.decision_id, decision.tenant_id) == ("dec_1", "acme")
    assert (decision.policy_version, decision.valid_until) == (7, math.inf)


def test_deny_list_drops_what_is_on_it(world):
    snapshot = world.build(world.all_permitted(), [world.tenant(mode="deny_list", expert_ids=["math"])])
    decision = world.ask(snapshot)
    assert decision.allowed == ("public", "news", "code", "legal")
    assert world.codes(decision) == {"math": "in_deny_list"}


def test_allow_list_allows_what_is_on_it_and_permitted(world):
    snapshot = world.build([world.agreement()], [world.tenant(mode="allow_list", expert_ids=["news", "math"])])
    decision = world.ask(snapshot)
    assert decision.allowed == ("public", "news")
    assert world.codes(decision)["math"] == "no_agreement"


def test_prohibition_overrides_any_number_of_permissions(world):
    permits = [world.agreement(f"p{i}") for i in range(5)]
    ban = world.agreement("ban", effect="prohibit", assignee="tenant:acme")
    for order in ([*permits, ban], [ban, *permits]):
        decision = world.ask(world.build(order, [world.tenant(mode="deny_list")]))
        assert "news" not in decision.allowed
        assert decision.excluded[0].rule == "agreement/ban@1"


def test_sets_stand_for_their_members(world):
    snapshot = world.build(
        [world.agreement(owner="forge", experts=["set:forge"])],
        [world.tenant(expert_ids=["set:forge"])],
        sets=[{"id": "set:forge", "experts": ["code", "legal"]}],
    )
    assert world.ask(snapshot).allowed == ("public", "code", "legal")
    assert world.ask(snapshot, only=("set:forge",)).allowed == ("public", "code", "legal")
    assert world.ask(snapshot, ignore=("set:forge",)).allowed == ("public",)


def test_only_filters_and_never_drops_public(world, open_world):
    decision = world.ask(open_world, only=("news", "news"))
    assert decision.allowed == ("public", "news")
    assert set(world.codes(decision).values()) == {"not_requested"}
    assert world.ask(open_world, only=()).allowed == ("public",)


def test_ignore_filters_and_wins_over_only(world, open_world):
    decision = world.ask(open_world, only=("news", "math"), ignore=("math",))
    assert decision.allowed == ("public", "news")
    assert world.codes(decision)["math"] == "ignored"


def test_public_may_be_ignored_only_where_the_anchor_is_optional(world, open_world):
    with pytest.raises(ExpertRequired):
        world.ask(open_world, ignore=("public",))
    optional = world.build(world.all_permitted(), [world.tenant(mode="deny_list", anchor_optional=True)])
    decision = world.ask(optional, ignore=("public",))
    assert decision.allowed == ("news", "math", "code", "legal")
    assert "public" in world.ask(optional, only=("news",)).allowed


def test_ignoring_what_is_not_allowed_anyway_is_no_error(world):
    snapshot = world.build([world.agreement()], [world.tenant()])
    decision = world.ask(snapshot, ignore=("news", "math"))
    assert world.codes(decision)["math"] == "no_agreement"


def test_asking_for_a_listed_expert_that_is_not_allowed_is_denied_with_reasons(world):
    snapshot = world.build([world.agreement()], [world.tenant(expert_ids=["news"])])
    with pytest.raises(ExpertDenied) as caught:
        world.ask(snapshot, only=("news", "math", "code"))
    assert [r.expert for r in caught.value.reasons] == ["math", "code"]
    assert caught.value.param == "flexgate.experts.only"


def test_default_expert_set_is_used_without_only(world):
    snapshot = world.build(world.all_permitted(), [world.tenant(mode="deny_list", default_experts=["news", "math"])])
    decision = world.ask(snapshot)
    assert decision.allowed == ("public", "news", "math")
    assert world.codes(decision) == {"code": "not_in_default_set", "legal": "not_in_default_set"}
    assert world.ask(snapshot, only=("code",)).allowed == ("public", "code")


HIDING = [
    pytest.param({"hidden": ["math"]}, {}, id="hidden-for-tenant"),
    pytest.param({}, {"visibility": "hidden"}, id="hidden-by-default"),
]


def _hiding_world(world, tenant, expert):
    experts = [{**e, **(expert if e["id"] == "math" else {})} for e in world.experts]
    return world.build(
        world.all_permitted(),
        [world.tenant(mode="deny_list", **tenant)],
        experts,
        [{"id": "set:math", "experts": ["math"]}],
    )


@pytest.mark.parametrize(("tenant", "expert"), HIDING)
def test_hidden_expert_appears_nowhere(world, tenant, expert):
    decision = world.ask(_hiding_world(world, tenant, expert))
    assert "math" not in repr(decision)


@pytest.mark.parametrize(("tenant", "expert"), HIDING)
@pytest.mark.parametrize("field", ["only", "ignore"])
def test_naming_a_hidden_expert_is_like_naming_nonsense(world, tenant, expert, field):
    snapshot = _hiding_world(world, tenant, expert)
    answers = set()
    for name in ("math", "set:math", "nonsense", "set:nonsense", "Not An Id", ""):
        with pytest.raises(UnknownExpert) as caught:
            world.ask(snapshot, **{field: ("news", name)})
        answers.add((type(caught.value), str(caught.value), caught.value.param))
    assert len(answers) == 1


def test_hidden_name_beside_a_denied_one_is_like_nonsense_beside_it(world):
    snapshot = world.build([], [world.tenant(hidden=["math"])])
    messages = set()
    for name in ("math", "nonsense"):
        with pytest.raises(UnknownExpert) as caught:
            world.ask(snapshot, only=("news", name))
        messages.add(str(caught.value))
    assert len(messages) == 1


def test_tenant_may_list_what_is_hidden_by_default(world):
    snapshot = _hiding_world(world, {"listed": ["math"]}, {"visibility": "hidden"})
    assert "math" in world.ask(snapshot).allowed


def test_hidden_for_a_tenant_wins_over_listed(world):
    snapshot = _hiding_world(world, {"listed": ["math"], "hidden": ["math"]}, {})
    assert "math" not in world.ask(snapshot).allowed


def test_set_with_hidden_members_stands_for_the_listed_ones(world):
    snapshot = world.build(
        world.all_permitted(),
        [world.tenant(mode="deny_list", hidden=["math"])],
        sets=[{"id": "set:two", "experts": ["math", "news"]}],
    )
    assert world.ask(snapshot, only=("set:two",)).allowed == ("public", "news")


@pytest.mark.parametrize(
    ("terms", "declared", "allowed"),
    [
        ("ai-input", "ai-input", True),
        ("ai-all", "ai-input", True),
        ("all", "ai-input", True),
        ("all", None, True),
        ("ai-all", "search", False),
        ("ai-input", "ai-all", False),
        ("train-ai", "ai-train", True),
        ("x-lab", "x-lab", True),
        ("ai-all", "x-lab", False),
    ],
)
def test_permission_covers_the_whole_declared_purpose(world, terms, declared, allowed):
    purposes = ["ai-input", "ai-all", "ai-train", "search", "x-lab"]
    snapshot = world.build([world.agreement(purposes=[terms])], [world.tenant(mode="deny_list", purposes=purposes)])
    assert ("news" in world.ask(snapshot, purpose=declared).allowed) is allowed


@pytest.mark.parametrize(
    ("terms", "declared", "prohibited"),
    [
        ("ai-train", "ai-train", True),
        ("ai-train", "ai-all", True),
        ("ai-train", None, True),
        ("ai-all", "ai-input", True),
        ("ai-train", "ai-input", False),
        ("ai-all", "search", False),
    ],
)
def test_prohibition_touches_any_part_of_the_declared_purpose(world, terms, declared, prohibited):
    purposes = ["ai-input", "ai-all", "ai-train", "search"]
    snapshot = world.build(
        [world.agreement(), world.agreement("no", effect="prohibit", purposes=[terms])],
        [world.tenant(mode="deny_list", purposes=purposes)],
    )
    assert ("news" not in world.ask(snapshot, purpose=declared).allowed) is prohibited


@pytest.mark.parametrize(
    ("terms", "declared", "permitted", "prohibited"),
    [
        ("DE", "DE", True, True),
        ("DE", "DE-BY", True, True),
        ("DE-BY", "DE", False, True),
        ("EU", "DE-BY", True, True),
        ("EEA", "EU", True, True),
        ("EU", "NO", False, False),
        ("EEA", "NO", True, True),
        ("US", "DE", False, False),
        ("DE", None, False, True),
    ],
)
def test_regions_cover_their_parts(world, terms, declared, permitted, prohibited):
    acme = world.tenant(mode="deny_list", regions=["DE", "DE-BY", "EU", "NO", "US"])
    permit = world.build([world.agreement(regions=[terms])], [acme])
    assert ("news" in world.ask(permit, region=declared).allowed) is permitted
    ban = [world.agreement(), world.agreement("no", effect="prohibit", regions=[terms])]
    assert ("news" not in world.ask(world.build(ban, [acme]), region=declared).allowed) is prohibited


@pytest.mark.parametrize(
    ("field", "word"),
    [("purpose", "ai-train"), ("purpose", "fun"), ("region", "FR"), ("region", "UK")],
)
def test_a_tenant_declares_only_what_is_registered_for_it(world, field, word):
    snapshot = world.build(tenants=[world.tenant(purposes=["search"], regions=["DE"])])
    with pytest.raises(ContextRefused) as caught:
        world.ask(snapshot, **{field: word})
    assert caught.value.param == f"flexgate.{field}"


def test_dates_take_effect_at_their_second(world, iso):
    snapshot = world.build(
        [world.agreement(not_before=iso(1000.0), not_after=iso(2000.0))],
        [world.tenant(mode="deny_list")],
    )
    for now, inside in ((999.999, False), (1000.0, True), (1999.999, True), (2000.0, False)):
        assert ("news" in world.ask(snapshot, now=now).allowed) is inside, now


def test_valid_until_is_when_the_first_allowed_expert_is_lost(world, iso):
    terms = [
        world.agreement("early", not_after=iso(2000.0)),
        world.agreement("next", not_before=iso(2000.0), not_after=iso(3000.0)),
        world.agreement("gap", not_before=iso(3001.0)),
        world.agreement("m", owner="institute", experts=["math"]),
        world.agreement("m-ban", owner="institute", experts=["math"], effect="prohibit", not_before=iso(2500.0)),
    ]
    snapshot = world.build(terms, [world.tenant(mode="deny_list")])
    assert world.ask(snapshot, now=1000.0).valid_until == 2500.0
    assert world.ask(snapshot, now=1000.0, only=("news",)).valid_until == 3000.0
    assert world.ask(snapshot, now=1000.0, only=()).valid_until == math.inf


def test_allowed_experts_cannot_be_made_by_hand():
    with pytest.raises(TypeError):
        AllowedExperts(["news"])
    with pytest.raises(TypeError):
        AllowedExperts()


def test_an_end_does_not_matter_beside_a_permission_without_one(world):
    terms = [world.agreement("forever"), world.agreement("ends", not_after="2030-01-01T00:00:00Z")]
    decision = world.ask(world.build(terms, [world.tenant(mode="deny_list")]))
    assert decision.allowed == ("public", "news")
    assert decision.valid_until == math.inf
