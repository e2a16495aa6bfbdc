"""The exact sentences. Each says which rule excludes the expert, and what would change it."""

from __future__ import annotations

import pytest

from flexgate.policies.errors import DecisionRefused

CHANGE = "An agreement with its owner, wire, would change this."


def _news(world, terms, tenant=None, **request):
    snapshot = world.build(terms, [world.tenant(**{"mode": "deny_list"} | (tenant or {}))])
    reasons = {r.expert: r for r in world.ask(snapshot, now=1_000_000.0, **request).excluded}
    return tuple(reasons["news"])[1:]


def test_no_agreement(world):
    assert _news(world, []) == (
        "no_agreement",
        "default_deny",
        f"No agreement permits expert 'news' to this project. {CHANGE}",
    )


def test_prohibited(world):
    assert _news(world, [world.agreement("ban", version=3, effect="prohibit")]) == (
        "prohibited",
        "agreement/ban@3",
        "Agreement 'ban' (version 3) prohibits expert 'news' to this project. "
        "Its owner, wire, terminating it would change this.",
    )


def test_prohibited_within_a_scope_and_for_a_time(world):
    terms = world.agreement(
        effect="prohibit",
        purposes=["ai-train", "search"],
        regions=["DE"],
        not_after="2026-01-01T00:00:00Z",
    )
    assert _news(world, [terms])[2] == (
        "Agreement 'a1' (version 1) prohibits expert 'news' to this project "
        "for ai-train, search in DE. Its owner, wire, terminating it, or the request declaring a "
        "purpose or region outside of it, or waiting until 2026-01-01T00:00:00Z would change this."
    )


def test_purpose_not_permitted(world):
    terms = [world.agreement(purposes=["search", "ai-input"])]
    assert _news(world, terms) == (
        "purpose_not_permitted",
        "agreement/a1@1",
        "Agreement 'a1' (version 1) permits expert 'news' for ai-input, search only, and the "
        "request declares no purpose. Declaring a permitted purpose would change this.",
    )
    message = _news(world, terms, {"purposes": ["ai-train"]}, purpose="ai-train")[2]
    assert "and the request declares 'ai-train'." in message


def test_region_not_permitted(world):
    assert _news(world, [world.agreement(regions=["EU"])]) == (
        "region_not_permitted",
        "agreement/a1@1",
        "Agreement 'a1' (version 1) permits expert 'news' in EU only, and the request declares no "
        "region. Declaring a permitted region would change this.",
    )


def test_agreement_not_started(world):
    assert _news(world, [world.agreement(not_before="2026-11-24T00:00:00Z")]) == (
        "agreement_not_started",
        "agreement/a1@1",
        "Agreement 'a1' (version 1) permits expert 'news' from 2026-11-24T00:00:00Z on. "
        "Waiting until then would change this.",
    )


def test_agreement_ended(world):
    assert _news(world, [world.agreement(not_after="1970-01-02T00:00:00Z")]) == (
        "agreement_ended",
        "agreement/a1@1",
        f"Agreement 'a1' (version 1) permitted expert 'news' until 1970-01-02T00:00:00Z. "
        f"{CHANGE.replace('An agreement', 'A new agreement')}",
    )


def test_not_in_allow_list(world):
    assert _news(world, [world.agreement()], {"mode": "allow_list"}) == (
        "not_in_allow_list",
        "project/allow_list",
        "Expert 'news' is not on this project's allow list. An administrator adding it would change this.",
    )


def test_in_deny_list(world):
    assert _news(world, [world.agreement()], {"expert_ids": ["news"]}) == (
        "in_deny_list",
        "project/deny_list",
        "Expert 'news' is on this project's deny list. An administrator removing it would change this.",
    )


def test_not_live(world):
    experts = [{**e, "live": e["id"] != "news"} for e in world.experts]
    snapshot = world.build([world.agreement()], [world.tenant(mode="deny_list")], experts)
    assert tuple(world.ask(snapshot).excluded[0]) == (
        "news",
        "not_live",
        "expert/live",
        "Expert 'news' is not being served. Loading it into the server would change this.",
    )


def test_not_requested(world):
    assert _news(world, [world.agreement()], only=()) == (
        "not_requested",
        "request/only",
        "The request's 'only' does not name expert 'news'. Naming it would change this.",
    )


def test_ignored(world):
    assert _news(world, [world.agreement()], ignore=("news",)) == (
        "ignored",
        "request/ignore",
        "The request's 'ignore' names expert 'news'. Leaving it out would change this.",
    )


def test_not_in_default_set(world):
    assert _news(world, [world.agreement()], {"default_experts": ["math"]}) == (
        "not_in_default_set",
        "project/default_experts",
        "Expert 'news' is not in this project's default expert set. "
        "Naming it in the request's 'only' would change this.",
    )


REFUSALS = [
    (
        {},
        {"only": ("news",)},
        "flexgate.experts.only",
        f"The policy does not allow 'news'. No agreement permits expert 'news' to this project. {CHANGE}",
    ),
    (
        {},
        {"only": ("public", "nonsense")},
        "flexgate.experts.only[1]",
        "'flexgate.experts.only[1]' names no expert that is listed for this project. "
        "GET /v1/experts shows those that are.",
    ),
    (
        {},
        {"ignore": ("public",)},
        "flexgate.experts.ignore",
        "'public' takes part in every request of this project. "
        "An administrator making the anchor optional would change this.",
    ),
    (
        {"anchor_optional": True},
        {"ignore": ("public",)},
        "flexgate.experts",
        "No expert is left for this request. Asking for an allowed expert would change this.",
    ),
    (
        {"purposes": ["search", "ai-input"]},
        {"purpose": "ai-train"},
        "flexgate.purpose",
        "This project may not declare the purpose 'ai-train' (registered: ai-input, search). "
        "An administrator registering it would change this.",
    ),
    (
        {},
        {"region": "DE"},
        "flexgate.region",
        "This project may not declare the region 'DE' (registered: none). "
        "An administrator registering it would change this.",
    ),
    (
        {},
        {"purpose": "fun"},
        "flexgate.purpose",
        "'fun' is not a purpose: use one of ai-all, ai-index, ai-input, ai-train, all, search, or a local word 'x-…'.",
    ),
    (
        {},
        {"region": "UK"},
        "flexgate.region",
        "'UK' is not a region: use an ISO 3166 country ('DE'), a subdivision ('DE-BY'), 'EU' or 'EEA'.",
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
        "'public' takes part in every request, and it is not being served. "
        "Loading it into the server would change this."
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
