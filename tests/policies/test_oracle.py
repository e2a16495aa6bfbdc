"""Decisions agree with a brute-force oracle: at random, and exhaustively in small worlds."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest

from flexgate.policies.agreements import Agreement
from flexgate.policies.cache import DecisionCache
from flexgate.policies.decide import decide
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.documents import Expert, Tenant
from flexgate.policies.errors import DecisionRefused
from flexgate.policies.snapshot import Snapshot


def _answer(make, *arguments):
    try:
        decision = make(*arguments)
    except DecisionRefused as error:
        return type(error).__name__, None, {}
    excluded = [reason.expert for reason in decision.excluded]
    assert len(excluded) == len(set(excluded))
    ids = [agreement and agreement.agreement_id for agreement in decision.agreements]
    counts_under = dict(zip(decision.allowed, ids, strict=True))
    assert decision.required <= set(decision.allowed)
    return (set(decision.allowed), set(excluded)), decision.valid_until, counts_under


def _compare(oracle, make_world, worlds, rng, decisions, per_world):
    """Compare that many decisions; returns how often each outcome came up."""
    outcomes = Counter()
    cache = DecisionCache()
    while outcomes.total() < decisions:
        world = make_world(rng)
        snapshot = worlds.snapshot_of(world)
        for _ in range(per_world):
            who = rng.choice(["t0", "t0", "t1", "t2"])
            request, now = worlds.random_request(rng), rng.choice(worlds.NOWS)
            expected = oracle.decide(world, who, request, now)
            question = (snapshot, who, worlds.request_of(request), now)
            answer, until, counts_under = _answer(decide, *question)
            assert answer == expected, (world, who, request, now)
            assert _answer(cache.decide, *question) == (answer, until, counts_under)
            for expert, agreement in counts_under.items():
                assert agreement == oracle.counts_under(world, who, expert, request, now), (world, who, request, now)
            if until is None:
                outcomes[answer] += 1
            else:
                assert until == oracle.valid_until(world, who, request, now)
                outcomes["finite" if until < math.inf else "lasting"] += 1
    return outcomes


def _check(oracle, worlds, seed, decisions, make_world=None):
    make_world = make_world or worlds.random_world
    outcomes = _compare(oracle, make_world, worlds, random.Random(seed), decisions, per_world=25)
    for kind in (
        "finite",
        "lasting",
        "UnknownTenant",
        "TenantArchived",
        "ContextRefused",
        "UnknownExpert",
        "ExpertDenied",
        "ExpertRequired",
        "RequiredExpertMissing",
        "EmptyGate",
    ):
        assert outcomes[kind] > decisions / 2000, (kind, outcomes)


def test_random_decisions_agree_with_the_oracle(oracle, worlds):
    _check(oracle, worlds, seed=20_261_123, decisions=10_000)


def test_experts_without_an_owner_are_decided_as_the_oracle_says(oracle, worlds):
    """Projects' lists alone decide about them, whatever agreements name them."""
    _check(oracle, worlds, 4, 3_000, lambda rng: worlds.disown(rng, worlds.random_world(rng)))


def test_a_gate_that_leaves_a_layer_without_an_expert_is_refused_as_the_oracle_says(oracle, worlds):
    thin = _compare(oracle, lambda rng: worlds.thin(rng, worlds.random_world(rng)), worlds, random.Random(5), 3_000, 25)
    assert min(thin["LayerWithoutExpert"], thin["lasting"], thin["finite"]) > 20, thin


def test_an_exclusion_of_too_low_a_grade_is_refused_as_the_oracle_says(oracle, worlds):
    graded = _compare(
        oracle, lambda rng: worlds.grade(rng, worlds.random_world(rng)), worlds, random.Random(6), 3_000, 25
    )
    assert min(graded["GradeTooLow"], graded["lasting"], graded["finite"]) > 20, graded


@pytest.mark.slow
@pytest.mark.sliced(2)
@pytest.mark.parametrize("seed", range(10))
def test_a_million_random_decisions_agree_with_the_oracle(oracle, worlds, seed):
    _check(oracle, worlds, seed, decisions=100_000)


_LISTED = {"owner": "ann", "live": True, "visibility": "listed", "required": False}
SMALL_EXPERTS = [{"id": id_, **_LISTED} for id_ in ("public", "a", "b", "c")]
SMALL_TENANTS = [
    {
        "id": id_,
        "mode": mode,
        "expert_ids": names,
        "hidden": [],
        "listed": [],
        "default_experts": None,
        "anchor_optional": False,
        "groups": [],
        "purposes": [],
        "regions": [],
        "archived": False,
    }
    for id_, mode, names in (
        ("x", "allow_list", ["a", "b"]),
        ("y", "deny_list", ["b"]),
        ("z", "deny_list", []),
    )
]
ASKED = {"purpose": None, "region": None, "only": None, "ignore": []}


def _every_kind(experts, effects):
    """Each effect with each assignee and each non-empty choice of `experts`."""
    choices = [list(chosen) for size in range(1, len(experts) + 1) for chosen in itertools.combinations(experts, size)]
    assignees = ["everyone", "tenant:x", "tenant:y", "tenant:z"]
    return list(itertools.product(effects, assignees, choices))


def _exhaust(oracle, experts, most, part=0, parts=1, effects=("permit", "prohibit")):
    """Every combination of up to `most` agreements, or one part of them; returns how many decisions were compared."""
    kinds = _every_kind(experts, effects)
    terms = [
        [
            {
                "id": f"g{n}",
                "owner": "ann",
                "experts": chosen,
                "assignee": assignee,
                "effect": effect,
                "purposes": None,
                "regions": None,
                "starts": -math.inf,
                "ends": math.inf,
            }
            for effect, assignee, chosen in kinds
        ]
        for n in range(most)
    ]
    edges = ("starts", "ends")
    compiled = [
        [Agreement.model_validate({k: v for k, v in t.items() if k not in edges}) for t in row] for row in terms
    ]
    catalogue = [Expert.model_validate(e) for e in SMALL_EXPERTS]
    tenants = [Tenant.model_validate({"name": "T", **t}) for t in SMALL_TENANTS]
    request = DecisionRequest(decision_id="d")
    compared = 0
    sizes = (itertools.combinations_with_replacement(range(len(kinds)), size) for size in range(most + 1))
    for chosen in itertools.islice(itertools.chain.from_iterable(sizes), part, None, parts):
        world = {
            "experts": SMALL_EXPERTS,
            "sets": {},
            "tenants": SMALL_TENANTS,
            "agreements": [terms[n][kind] for n, kind in enumerate(chosen)],
        }
        snapshot = Snapshot.build(
            policy_version=1,
            experts=catalogue,
            tenants=tenants,
            agreements=[compiled[n][kind] for n, kind in enumerate(chosen)],
        )
        for who in ("x", "y", "z"):
            expected = oracle.decide(world, who, ASKED, 0.0)
            assert _answer(decide, snapshot, who, request, 0.0)[0] == expected, world
            compared += 1
    return compared


def test_every_small_policy_agrees_with_the_oracle(oracle):
    effects = ("permit", "prohibit", "require")
    assert _exhaust(oracle, ["a", "b"], most=2, effects=effects) == 3 * (1 + 36 + 666)


PARTS = 17  # shares no factor with the number of kinds: each part has all of them


@pytest.mark.slow
@pytest.mark.sliced(2)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_policy_of_three_tenants_four_experts_and_four_agreements(oracle, part):
    compared = _exhaust(oracle, ["a", "b", "c"], most=4, part=part, parts=PARTS)
    assert compared == 3 * len(range(part, math.comb(56 + 4, 4), PARTS))
