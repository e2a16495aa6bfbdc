"""The cache answers exactly as the pure function does."""

from __future__ import annotations

import pytest

from flexgate.policies import cache as cache_module
from flexgate.policies.cache import DecisionCache
from flexgate.policies.decide import decide
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.errors import ExpertDenied, TenantArchived, UnknownExpert

REQUEST = DecisionRequest(decision_id="dec_1")


@pytest.fixture
def entitlements_computed(monkeypatch):
    calls = []
    compute = cache_module.entitlements
    monkeypatch.setattr(cache_module, "entitlements", lambda *a: calls.append(a) or compute(*a))
    return calls


@pytest.fixture
def dated(world, iso):
    return world.build(
        [world.agreement(not_before=iso(1000.0), not_after=iso(2000.0))],
        [world.tenant(mode="deny_list")],
    )


def test_same_answer_inside_and_across_time_slots_in_any_order_of_times(dated, entitlements_computed):
    cache = DecisionCache()
    times = [0.0, 999.9, 1000.0, 1500.0, 1999.9, 2000.0, 9000.0]
    for now in times + times[::-1]:
        assert cache.decide(dated, "acme", REQUEST, now) == decide(dated, "acme", REQUEST, now)
    assert len(entitlements_computed) == 5


def test_kept_decision_carries_the_new_decision_id(dated, entitlements_computed):
    cache = DecisionCache()
    for name in ("one", "two"):
        request = DecisionRequest(decision_id=name)
        assert cache.decide(dated, "acme", request, 0.0).decision_id == name
    assert len(entitlements_computed) == 1


def test_new_snapshot_starts_anew(world, dated):
    cache = DecisionCache()
    assert "news" in cache.decide(dated, "acme", REQUEST, 1500.0).allowed
    banned = world.build([], [world.tenant(mode="deny_list")])
    assert "news" not in cache.decide(banned, "acme", REQUEST, 1500.0).allowed
    archived = world.build([], [world.tenant(archived=True)])
    with pytest.raises(TenantArchived):
        cache.decide(archived, "acme", REQUEST, 1500.0)


def test_questions_are_kept_apart(world):
    snapshot = world.build(
        [world.agreement(purposes=["search"], regions=["DE"])],
        [
            world.tenant(mode="deny_list", purposes=["search"], regions=["DE"]),
            world.tenant(id="other", purposes=["search"], regions=["DE"]),
        ],
    )
    cache = DecisionCache()
    questions = [
        (who, DecisionRequest(decision_id="d", purpose=p, region=r, only=only, ignore=ignore))
        for who in ("acme", "other")
        for p in (None, "search")
        for r in (None, "DE")
        for only in (None, ())
        for ignore in ((), ("news",))
    ]
    for who, request in questions * 2:
        assert cache.decide(snapshot, who, request, 1.0) == decide(snapshot, who, request, 1.0)


def test_refusals_are_raised_every_time(world):
    cache = DecisionCache()
    snapshot = world.build()
    request = DecisionRequest(decision_id="d", only=("news",))
    for _ in range(2):
        with pytest.raises(ExpertDenied):
            cache.decide(snapshot, "acme", request, 1.0)


def test_order_and_repetition_of_names_make_no_other_question(dated, entitlements_computed):
    cache = DecisionCache()
    for only, ignore in (
        (None, ("news", "math")),
        (None, ("math", "news")),
        (None, ("news", "news", "math")),
        (("public", "news"), ()),
        (("news", "public", "news"), ()),
    ):
        request = DecisionRequest(decision_id="d", only=only, ignore=ignore)
        assert cache.decide(dated, "acme", request, 1500.0) == decide(dated, "acme", request, 1500.0)
    assert len(entitlements_computed) == len(cache) == 2


def test_refusals_take_no_place_and_name_the_position_of_this_request(world):
    cache, snapshot = DecisionCache(), world.build()
    for names in (("zzz", "public"), ("public", "zzz")):
        with pytest.raises(UnknownExpert) as refused:
            cache.decide(snapshot, "acme", DecisionRequest(decision_id="d", only=names), 1.0)
        assert refused.value.param == f"flexgate.experts.only[{names.index('zzz')}]"
    assert len(cache) == 0


def ask(cache, snapshot, who, *questions):
    """Ask `who`'s questions, each by the purpose that it declares."""
    for purpose in questions:
        cache.decide(snapshot, who, DecisionRequest(decision_id="d", purpose=purpose), 1.0)


@pytest.fixture
def many(world):
    purposes = ["x-search", "x-chat", "x-code", "x-news"]
    return world.build([], [world.tenant(id=id_, purposes=purposes) for id_ in ("a", "b", "c")])


def test_a_tenant_pushes_out_its_own_decisions_alone(many, entitlements_computed):
    cache = DecisionCache(max_entries=100, max_of_one=2)
    ask(cache, many, "a", "x-search", "x-chat")
    ask(cache, many, "b", "x-search", "x-chat", "x-code", "x-news")
    assert (len(cache), len(entitlements_computed)) == (4, 6)
    ask(cache, many, "a", "x-search", "x-chat")
    ask(cache, many, "b", "x-code", "x-news")
    assert len(entitlements_computed) == 6
    ask(cache, many, "b", "x-search")
    assert (len(cache), len(entitlements_computed)) == (4, 7)


def test_a_full_memory_gives_way_to_a_tenant_that_has_nothing_in_it(many, entitlements_computed):
    cache = DecisionCache(max_entries=3, max_of_one=2)
    ask(cache, many, "a", "x-search")
    ask(cache, many, "b", "x-search", "x-chat")
    ask(cache, many, "a", "x-chat")
    assert (len(cache), len(entitlements_computed)) == (3, 4)
    ask(cache, many, "b", "x-search", "x-chat")
    assert len(entitlements_computed) == 4
    ask(cache, many, "c", "x-search")
    ask(cache, many, "b", "x-search", "x-chat")
    assert (len(cache), len(entitlements_computed)) == (3, 5)


def test_a_decision_that_is_computed_anew_takes_no_other_place(dated):
    cache = DecisionCache(max_entries=2, max_of_one=2)
    for now in (0.0, 1500.0, 9000.0):
        cache.decide(dated, "acme", REQUEST, now)
    assert len(cache) == 1
