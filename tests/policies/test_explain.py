"""Explanations and simulations say what decisions do."""

from __future__ import annotations

import math
import random

import pytest

from flexgate.policies import decide as deciding
from flexgate.policies import explain as explaining
from flexgate.policies.decide import decide
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.entitlements import entitlements
from flexgate.policies.errors import ContextRefused, DecisionRefused, LayerWithoutExpert, UnknownTenant
from flexgate.policies.explain import explain
from flexgate.policies.simulate import Replay, simulate

REQUEST = DecisionRequest(decision_id="d")


def test_allowed_experts_name_their_agreements_and_others_their_reason(world, iso):
    snapshot = world.build(
        [
            world.agreement("two", not_after=iso(2000.0)),
            world.agreement("one", not_after=iso(1500.0)),
            world.agreement("early", not_after=iso(900.0)),
            world.agreement("lab", purposes=["x-lab"]),
        ],
        [world.tenant(mode="deny_list", hidden=["legal"])],
    )
    explained = {e.expert: e for e in explain(snapshot, "acme", REQUEST, 1000.0).experts}
    assert list(explained) == ["public", "news", "math", "code"]
    assert explained["public"].permitted_by == ("anchor",)
    assert explained["news"].permitted_by == ("agreement/one@1", "agreement/two@1")
    assert [explained[expert].counts_under for expert in explained] == [None, "agreement/one@1", None, None]
    assert (explained["news"].until, explained["public"].until) == (2000.0, math.inf)
    assert explained["math"].refused.code == "no_agreement"
    assert {e.grade for e in explained.values()} == {"unknown"}
    assert (explained["math"].until, explained["math"].permitted_by) == (None, ())


def test_why_requests_are_refused_is_explained_beside_the_experts(world):
    experts = [{**one, "empty_layers": [1] if one["id"] == "public" else [0, 1]} for one in world.experts]
    experts[2]["empty_layers"] = [0]
    snapshot = world.build(world.all_permitted(), [world.tenant(mode="deny_list", expert_ids=["math"])], experts)
    refused = explain(snapshot, "acme", REQUEST, 1.0).refused
    assert type(refused) is LayerWithoutExpert
    assert str(refused).startswith("The experts of this request leave a layer of the model without any")
    whole = world.build(world.all_permitted(), [world.tenant(mode="deny_list")], experts)
    assert explain(whole, "acme", REQUEST, 1.0).refused is None
    assert explain(whole, "acme", DecisionRequest(decision_id="d", only=()), 1.0).refused is None, (
        "a filter is not its matter"
    )
    with pytest.raises(ContextRefused):
        explain(whole, "acme", DecisionRequest(decision_id="d", purpose="search"), 1.0)


def test_entitlements_are_computed_once(world, monkeypatch):
    """Experts and the refusal are of one moment and one context."""
    calls = []
    monkeypatch.setattr(explaining, "entitlements", lambda *given: calls.append(given) or entitlements(*given))
    monkeypatch.setattr(deciding, "entitlements", explaining.entitlements)
    explain(world.build(), "acme", REQUEST, 1.0)
    assert len(calls) == 1


def test_explaining_an_unknown_tenant_is_refused(world):
    with pytest.raises(UnknownTenant):
        explain(world.build(), "nobody", REQUEST, 1.0)


def test_explanations_agree_with_decisions(worlds):
    rng = random.Random(3)
    compared = 0
    while compared < 300:
        random_world = worlds.random_world(rng)
        random_world["tenants"][0]["default_experts"] = None
        snapshot, now = worlds.snapshot_of(random_world), rng.choice(worlds.NOWS)
        try:
            decision = decide(snapshot, "t0", REQUEST, now)
        except DecisionRefused:
            continue
        explained = explain(snapshot, "t0", REQUEST, now).experts
        assert tuple(e.expert for e in explained if e.refused is None) == decision.allowed
        assert all(e.permitted_by for e in explained if e.refused is None)
        assert tuple(e.refused for e in explained if e.refused) == decision.excluded
        rules = [agreement and agreement.rule for agreement in decision.agreements]
        assert [e.counts_under for e in explained if e.refused is None] == rules
        compared += 1


def test_simulation_lists_who_gains_and_who_loses(world):
    tenants = [
        world.tenant(mode="deny_list"),
        world.tenant(id="beta", expert_ids=["math"]),
        world.tenant(id="same"),
    ]
    before = world.build([world.agreement()], tenants)
    after = world.build(
        [world.agreement("m", owner="institute", experts=["math"])],
        [*tenants[:1], *tenants[1:], world.tenant(id="late")],
    )
    asked = [
        Replay("acme", REQUEST, 1.0),
        Replay("beta", REQUEST, 1.0),
        Replay("same", REQUEST, 1.0),
        Replay("acme", DecisionRequest(decision_id="d", only=("news",)), 1.0),
        Replay("late", REQUEST, 1.0),
    ]
    found = [
        (d.replay.tenant_id, d.gained, d.lost, d.refused_before, d.refused_after)
        for d in simulate(before, after, asked)
    ]
    assert found == [
        ("acme", ("math",), ("news",), None, None),
        ("beta", ("math",), (), None, None),
        ("acme", (), ("public", "news"), None, "ExpertDenied"),
        ("late", ("public",), (), "UnknownTenant", None),
    ]
    assert simulate(before, before, asked) == []
