"""Which of several agreements that permit the same use it counts under."""

from __future__ import annotations

import itertools

import pytest

EARLY, LATE, ENDS = "2020-01-01T00:00:00Z", "2024-01-01T00:00:00Z", "2040-01-01T00:00:00Z"
LIMITED = {"purposes": ["ai-all"], "regions": ["DE"], "not_before": LATE}
BY_RANK = [
    {"id": "z1", "assignee": "tenant:acme", **LIMITED},
    {"id": "z2", "assignee": "tenant:acme", "purposes": ["ai-all"]},
    {"id": "z3", "assignee": "tenant:acme", "regions": ["DE"], "not_before": LATE, "not_after": ENDS},
    {"id": "z4", "assignee": "tenant:acme", "not_before": LATE},
    {"id": "z5", "assignee": "tenant:acme", "not_before": EARLY},
    {"id": "z6", "assignee": "tenant:acme", "purposes": ["all"]},
    {"id": "z7", "assignee": "tenant:acme"},
    {"id": "y1", "assignee": "group:red", **LIMITED},
    {"id": "y2", "assignee": "group:blue"},
    {"id": "x1", "assignee": "everyone", **LIMITED},
    {"id": "x2", "assignee": "everyone"},
]
"""The most special first; ids come to it last."""


def counted(world, agreements, **declared):
    """The agreement that a use of `news` counts under, by its place in each decision."""
    tenant = world.tenant(mode="deny_list", groups=["red", "blue"], purposes=["ai-input"], regions=["DE"])
    decision = world.ask(world.build(agreements, [tenant]), **declared)
    found = dict(zip(decision.allowed, decision.agreements, strict=True))
    assert found["public"] is None
    return found["news"] and found["news"].agreement_id


@pytest.mark.parametrize(("special", "general"), itertools.combinations(BY_RANK, 2), ids=lambda terms: terms["id"])
def test_a_use_counts_under_the_special_agreement_not_the_general_one(world, special, general):
    both = [world.agreement(**general), world.agreement(**special)]
    assert counted(world, both, purpose="ai-input", region="DE") == special["id"]
    assert counted(world, both[::-1], purpose="ai-input", region="DE") == special["id"]


def test_what_does_not_cover_the_request_does_not_count(world):
    both = [world.agreement(**BY_RANK[0]), world.agreement(**BY_RANK[-1])]
    assert counted(world, both) == "x2"
    assert counted(world, both, purpose="ai-input") == "x2"


@pytest.mark.parametrize(("now", "named"), [(999.0, "wide"), (1000.0, "own"), (1999.0, "own"), (2000.0, "wide")])
def test_only_an_agreement_in_force_counts(world, iso, now, named):
    own = world.agreement("own", assignee="tenant:acme", not_before=iso(1000.0), not_after=iso(2000.0))
    snapshot = world.build([world.agreement("wide"), own], [world.tenant(mode="deny_list")])
    (_, agreement) = world.ask(snapshot, now=now).agreements
    assert (agreement.agreement_id, agreement.version) == (named, 1)


def test_an_agreement_that_follows_without_a_gap_counts_from_its_start(world, iso):
    first = world.agreement("first", not_after=iso(2000.0))
    then = world.agreement("then", assignee="tenant:acme", not_before=iso(2000.0))
    snapshot = world.build([first, then], [world.tenant(mode="deny_list")])
    named = [world.ask(snapshot, now=now).agreements[1].agreement_id for now in (1999.0, 2000.0)]
    assert named == ["first", "then"]


def test_a_prohibition_is_never_what_a_use_counts_under(world):
    ban = world.agreement("ban", effect="prohibit", assignee="tenant:acme", purposes=["search"])
    assert counted(world, [ban, world.agreement("wide")], purpose="ai-input") == "wide"


def test_an_expert_that_the_request_leaves_out_counts_under_nothing(world):
    snapshot = world.build(world.all_permitted(), [world.tenant(mode="deny_list")])
    decision = world.ask(snapshot, only=("math",))
    assert decision.allowed == ("public", "math")
    assert [agreement and agreement.rule for agreement in decision.agreements] == [None, "agreement/p-math@1"]
