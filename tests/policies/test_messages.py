"""The exact sentences. Each says which rule excludes the expert, and what to do."""

from __future__ import annotations

import pytest

from flexgate.policies.errors import DecisionRefused

NO_AGREEMENT = "No agreement permits this project to use expert 'news'. Ask its owner, wire, for one."


def _news(world, terms, tenant=None, **request):
    snapshot = world.build(terms, [world.tenant(**{"mode": "deny_list"} | (tenant or {}))])
    reasons = {r.expert: r for r in world.ask(snapshot, now=1_000_000.0, **request).excluded}
    return tuple(reasons["news"])[2:]


def test_no_agreement(world):
    assert _news(world, []) == (
        "no_agreement",
        "default_deny",
        NO_AGREEMENT,
    )


def test_prohibited(world):
    assert _news(world, [world.agreement("ban", version=3, effect="prohibit")]) == (
        "prohibited",
        "agreement/ban@3",
        "Agreement 'ban' (version 3) prohibits this project from using expert 'news'. "
        "Ask its owner, wire, to terminate the agreement.",
    )


def test_prohibited_within_a_scope_and_for_a_time(world):
    terms = world.agreement(
        effect="prohibit",
        purposes=["ai-train", "search"],
        regions=["DE"],
        not_after="2026-01-01T00:00:00Z",
    )
    assert _news(world, [terms])[2] == (
        "Agreement 'a1' (version 1) prohibits this project from using expert 'news' "
        "(purposes: ai-train, search; regions: DE). Ask its owner, wire, to terminate the agreement, "
        "or declare a purpose or region that it does not cover, or try again after 2026-01-01T00:00:00Z."
    )


def test_purpose_not_permitted(world):
    terms = [world.agreement(purposes=["search", "ai-input"])]
    assert _news(world, terms) == (
        "purpose_not_permitted",
        "agreement/a1@1",
        "Agreement 'a1' (version 1) permits expert 'news' for these purposes only: ai-input, search. "
        "The request declares no purpose. Declare one of them in 'flexgate.purpose'.",
    )
    message = _news(world, terms, {"purposes": ["ai-train"]}, purpose="ai-train")[2]
    assert "The request declares 'ai-train'." in message


def test_region_not_permitted(world):
    assert _news(world, [world.agreement(regions=["EU"])]) == (
        "region_not_permitted",
        "agreement/a1@1",
        "Agreement 'a1' (version 1) permits expert 'news' in these regions only: EU. "
        "The request declares no region. Declare one of them in 'flexgate.region'.",
    )


def test_agreement_not_started(world):
    assert _news(world, [world.agreement(not_before="2026-11-24T00:00:00Z")]) == (
        "agreement_not_started",
        "agreement/a1@1",
        "Agreement 'a1' (version 1) permits expert 'news' only from 2026-11-24T00:00:00Z on. Try again then.",
    )


def test_agreement_ended(world):
    assert _news(world, [world.agreement(not_after="1970-01-02T00:00:00Z")]) == (
        "agreement_ended",
        "agreement/a1@1",
        "Agreement 'a1' (version 1) permitted expert 'news' until 1970-01-02T00:00:00Z. "
        "Ask its owner, wire, for a new agreement.",
    )


def test_not_in_allow_list(world):
    assert _news(world, [world.agreement()], {"mode": "allow_list"}) == (
        "not_in_allow_list",
        "project/allow_list",
        "Expert 'news' is not on this project's allow list. Ask an administrator to add it.",
    )


def test_in_deny_list(world):
    assert _news(world, [world.agreement()], {"expert_ids": ["news"]}) == (
        "in_deny_list",
        "project/deny_list",
        "Expert 'news' is on this project's deny list. Ask an administrator to remove it.",
    )


def test_not_live(world):
    experts = [{**e, "live": e["id"] != "news"} for e in world.experts]
    snapshot = world.build([world.agreement()], [world.tenant(mode="deny_list")], experts)
    assert tuple(world.ask(snapshot).excluded[0]) == (
        "news",
        "unknown",
        "not_live",
        "expert/live",
        "Expert 'news' is not loaded on this server. Ask an administrator to load it.",
    )


def test_not_requested(world):
    assert _news(world, [world.agreement()], only=()) == (
        "not_requested",
        "request/only",
        "'flexgate.experts.only' does not name expert 'news'. Name it there to use it.",
    )


def test_ignored(world):
    assert _news(world, [world.agreement()], ignore=("news",)) == (
        "ignored",
        "request/ignore",
        "'flexgate.experts.ignore' names expert 'news'. Remove it from there to use it.",
    )


def test_not_in_default_set(world):
    assert _news(world, [world.agreement()], {"default_experts": ["math"]}) == (
        "not_in_default_set",
        "project/default_experts",
        "Expert 'news' is not in this project's default expert set. Name it in 'flexgate.experts.only' to use it.",
    )


REFUSALS = [
    (
        {},
        {"only": ("news",)},
        "flexgate.experts.only",
        NO_AGREEMENT,
    ),
    (
        {},
        {"only": ("public", "nonsense")},
        "flexgate.experts.only[1]",
        "'flexgate.experts.only[1]' does not name an expert or set that is visible to this project. "
        "GET /v1/experts lists its experts.",
    ),
    (
        {},
        {"ignore": ("public",)},
        "flexgate.experts.ignore",
        "'flexgate.experts.ignore' names 'public', which every request to this server uses. "
        "Remove it from there, or ask an administrator to set 'anchor_optional'.",
    ),
    (
        {"anchor_optional": True},
        {"ignore": ("public",)},
        "flexgate.experts",
        "'flexgate.experts' leaves no expert for this request. Keep at least one that the project may use.",
    ),
    (
        {"purposes": ["search", "ai-input"]},
        {"purpose": "ai-train"},
        "flexgate.purpose",
        "The purpose 'ai-train' is not registered for this project (registered: ai-input, search). "
        "Declare a registered one, or ask an administrator to register it.",
    ),
    (
        {},
        {"region": "DE"},
        "flexgate.region",
        "No region is registered for this project, so that no request may declare 'DE'. "
        "Declare none, or ask an administrator to register it.",
    ),
    (
        {},
        {"purpose": "fun"},
        "flexgate.purpose",
        "'fun' is not a purpose; use one of ai-all, ai-index, ai-input, ai-train, all, search, or a purpose of your "
        "own that starts with 'x-'.",
    ),
    (
        {},
        {"region": "UK"},
        "flexgate.region",
        "'UK' is not a region; use an ISO 3166 country ('DE'), a subdivision ('DE-BY'), 'EU' or 'EEA'.",
    ),
    ({"archived": True}, {}, None, "Project 'acme' is archived. Use a key of another project."),
]


@pytest.mark.parametrize(("tenant", "request_", "param", "message"), REFUSALS)
def test_refusal(world, tenant, request_, param, message):
    with pytest.raises(DecisionRefused) as caught:
        world.ask(world.build([], [world.tenant(**tenant)]), **request_)
    assert (str(caught.value), caught.value.param) == (message, param)


def test_unknown_tenant_refusal(world):
    with pytest.raises(DecisionRefused) as caught:
        world.ask(world.build(), who="nobody")
    assert str(caught.value) == "There is no project 'nobody'. Check the id."


def test_anchor_that_is_not_live(world):
    experts = [{**world.experts[0], "live": False}]
    with pytest.raises(DecisionRefused) as caught:
        world.ask(world.build(experts=experts))
    assert str(caught.value) == (
        "Expert 'public', which every request to this server uses, is not available to this request. "
        "Expert 'public' is not loaded on this server. Ask an administrator to load it."
    )


WHICH = [
    ("prohibited", [("b", {"effect": "prohibit"}), ("a", {"effect": "prohibit"})], "a"),
    ("purpose_not_permitted", [("b", {"purposes": ["search"]}), ("a", {"purposes": ["x-l"]})], "a"),
    ("region_not_permitted", [("b", {"regions": ["DE"]}), ("a", {"regions": ["FR"]})], "a"),
    (
        "purpose_not_permitted",
        [("b", {"purposes": ["search"]}), ("a", {"purposes": ["search"], "regions": ["DE"]})],
        "b",
    ),
    ("agreement_not_started", [("a", {"not_before": 3000.0}), ("b", {"not_before": 2500.0})], "b"),
    ("agreement_not_started", [("b", {"not_before": 3000.0}), ("a", {"not_before": 3000.0})], "a"),
    ("agreement_ended", [("a", {"not_after": 500.0}), ("b", {"not_after": 900.0})], "b"),
    ("agreement_ended", [("b", {"not_after": 900.0}), ("a", {"not_after": 900.0})], "a"),
    ("agreement_ended", [("a", {"not_after": 1000.0})], "a"),
    ("agreement_not_started", [("a", {"not_before": 2000.0}), ("b", {"not_after": 900.0})], "a"),
    ("purpose_not_permitted", [("a", {"not_before": 1000.0, "purposes": ["search"]})], "a"),
    ("no_agreement", [("a", {"not_before": 3000.0, "purposes": ["search"]})], None),
]


@pytest.mark.parametrize(("code", "terms", "named"), WHICH)
def test_of_several_agreements_the_reason_names_the_nearest_then_the_first(world, iso, code, terms, named):
    dated = [(id_, {k: iso(v) if isinstance(v, float) else v for k, v in fields.items()}) for id_, fields in terms]
    documents = [world.agreement(id_, **fields) for id_, fields in dated]
    for order in (documents, documents[::-1]):
        snapshot = world.build(order, [world.tenant(mode="deny_list")])
        reason = world.ask(snapshot, now=1000.0).excluded[0]
        expected = "default_deny" if named is None else f"agreement/{named}@1"
        assert (reason.code, reason.rule) == (code, expected)
