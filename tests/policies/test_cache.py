"""The cache answers exactly as the pure function does."""

from __future__ import annotations

import pytest

from flexgate.policies import cache as cache_module
from flexgate.policies.cache import DecisionCache
from flexgate.policies.decide import decide
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.errors import ExpertDenied, TenantArchived

REQUEST = DecisionRequest(decision_id="dec_1")


@pytest.fixture
def grants_computed(monkeypatch):
    calls = []
    compute = cache_module.grant
    monkeypatch.setattr(cache_module, "grant", lambda *a: calls.append(a) or compute(*a))
    return calls


@pytest.fixture
def dated(world, iso):
    return world.build(
        [world.agreement(not_before=iso(1000.0), not_after=iso(2000.0))],
        [world.tenant(mode="deny_list")],
    )


def test_same_answer_inside_and_across_time_slots_in_any_order_of_times(dated, grants_computed):
    cache = DecisionCache()
    times = [0.0, 999.9, 1000.0, 1500.0, 1999.9, 2000.0, 9000.0]
    for now in times + times[::-1]:
        assert cache.decide(dated, "acme", REQUEST, now) == decide(dated, "acme", REQUEST, now)
    assert len(grants_computed) == 5


def test_kept_decision_carries_the_new_decision_id(dated, grants_computed):
    cache = DecisionCache()
    for name in ("one", "two"):
        request = DecisionRequest(decision_id=name)
        assert cache.decide(dated, "acme", request, 0.0).decision_id == name
    assert len(grants_computed) == 1


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


def test_memory_is_bounded(dated, grants_computed):
    cache = DecisionCache(max_entries=2)
    for count in range(5):
        request = DecisionRequest(decision_id="d", ignore=("news",) * count)
        cache.decide(dated, "acme", request, 0.0)
    assert len(grants_computed) == 5
    assert len(cache) <= 2
