"""What must hold in every world: default deny, prohibitions win, order and repetition are nothing,
changes that restrict never widen, and hidden means absent.
"""

from __future__ import annotations

import copy
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgate.policies.decide import decide
from flexgate.policies.errors import DecisionRefused, ExpertDenied

EVERYTHING = {"purposes": None, "regions": None, "starts": float("-inf"), "ends": float("inf")}

in_many_worlds = settings(max_examples=150, derandomize=True, database=None)
seeds = given(seed=st.integers(0, 2**32 - 1))


@pytest.fixture(scope="module")
def case(worlds):
    """A seed to a random world, tenant, request and time."""

    def make(seed):
        rng = random.Random(seed)
        world = worlds.random_world(rng)
        for tenant in world["tenants"]:
            tenant["archived"] = False
        asking, request = world["tenants"][0], worlds.random_request(rng)
        request["purpose"] = rng.choice([None, *asking["purposes"]])
        request["region"] = rng.choice([None, *asking["regions"]])
        return world, asking["id"], request, rng.choice(worlds.NOWS), rng

    return make


@pytest.fixture(scope="module")
def outcome(worlds):
    """What a caller can tell: the whole decision, or the whole error."""

    def make(world, who, request, now):
        try:
            return decide(worlds.snapshot_of(world), who, worlds.request_of(request), now)
        except ExpertDenied as error:
            return type(error).__name__, str(error), error.param, error.reasons
        except DecisionRefused as error:
            return type(error).__name__, str(error), error.param

    return make


@pytest.fixture(scope="module")
def allowed(outcome):
    """The allowed experts; none when refused."""

    def make(*arguments):
        result = outcome(*arguments)
        return set(getattr(result, "allowed", ()))

    return make


def test_the_worlds_are_worth_asking(case, outcome):
    results = [outcome(*case(seed)[:4]) for seed in range(300)]
    decisions = [r for r in results if hasattr(r, "allowed")]
    assert len(decisions) > 100
    assert sum(len(r.allowed) > 1 for r in decisions) > 30
    assert sum(r.valid_until < float("inf") for r in decisions) > 10


@in_many_worlds
@seeds
def test_every_allowed_expert_has_a_permission_of_its_owner(case, allowed, oracle, seed):
    world, who, request, now, _ = case(seed)
    owner = {expert["id"]: expert["owner"] for expert in world["experts"]}
    for expert in allowed(world, who, request, now) - {"public"}:
        assert any(
            terms["effect"] == "permit"
            and terms["owner"] == owner[expert]
            and expert in oracle.expand(terms["experts"], world["sets"])
            and terms["starts"] <= now < terms["ends"]
            for terms in world["agreements"]
        )


@in_many_worlds
@seeds
def test_without_agreements_nothing_but_public_is_allowed(case, allowed, seed):
    world, who, request, now, _ = case(seed)
    assert allowed({**world, "agreements": []}, who, request, now) <= {"public"}


@in_many_worlds
@seeds
def test_prohibition_overrides_every_permission(case, allowed, oracle, seed):
    world, who, request, now, rng = case(seed)
    expert = rng.choice([e for e in world["experts"] if e["id"] != "public"])
    ban = {
        "id": "ban",
        "owner": expert["owner"],
        "experts": [expert["id"]],
        "assignee": rng.choice(["everyone", f"tenant:{who}"]),
        "effect": "prohibit",
        **EVERYTHING,
    }
    before = allowed({**world}, who, {**request, "only": None}, now)
    banned = {**world, "agreements": [*world["agreements"], ban]}
    required = oracle.required(world, world["tenants"][0], request["purpose"], request["region"], now)
    left = set() if expert["id"] in required else before - {expert["id"]}
    assert allowed(banned, who, {**request, "only": None}, now) == left


@in_many_worlds
@seeds
def test_order_and_repetition_change_nothing(case, outcome, seed):
    world, who, request, now, rng = case(seed)
    mixed = copy.deepcopy(world)
    for kind in ("agreements", "tenants"):
        mixed[kind] += rng.choices(mixed[kind], k=2) if mixed[kind] else []
        rng.shuffle(mixed[kind])
    for documents in (mixed["agreements"], mixed["tenants"]):
        for document in documents:
            for value in document.values():
                if isinstance(value, list):
                    rng.shuffle(value)
    mixed["sets"] = dict(reversed(mixed["sets"].items()))
    assert outcome(mixed, who, request, now) == outcome(world, who, request, now)


@in_many_worlds
@seeds
def test_order_of_the_catalogue_orders_the_answer_and_nothing_else(case, outcome, seed):
    world, who, request, now, rng = case(seed)
    order = rng.sample(world["experts"], len(world["experts"]))
    one = outcome(world, who, request, now)
    two = outcome({**world, "experts": order}, who, request, now)
    if hasattr(one, "allowed"):
        assert set(one.allowed) == set(two.allowed)
        assert set(one.excluded) == set(two.excluded)
        places = [e["id"] for e in order]
        assert list(two.allowed) == sorted(two.allowed, key=places.index)
        excluded = [reason.expert for reason in two.excluded]
        assert excluded == sorted(excluded, key=places.index)
    else:
        assert one[0] == two[0]


@in_many_worlds
@seeds
def test_a_new_prohibition_never_widens(case, allowed, worlds, seed):
    world, who, request, now, rng = case(seed)
    ban = {**worlds.agreement(rng, "ban", world["experts"]), "effect": "prohibit"}
    wider = allowed(world, who, request, now)
    assert allowed({**world, "agreements": [*world["agreements"], ban]}, who, request, now) <= wider


@in_many_worlds
@seeds
def test_a_permission_less_never_widens(case, allowed, seed):
    world, who, request, now, _ = case(seed)
    wider = allowed(world, who, request, now)
    for terms in world["agreements"]:
        if terms["effect"] == "permit":
            fewer = [other for other in world["agreements"] if other is not terms]
            assert allowed({**world, "agreements": fewer}, who, request, now) <= wider


@in_many_worlds
@seeds
def test_limiting_a_permission_never_widens_and_limiting_a_prohibition_never_narrows(case, allowed, seed):
    world, who, request, now, rng = case(seed)
    request = {**request, "only": None}
    if not world["agreements"]:
        return
    terms = rng.choice(world["agreements"])
    if terms["effect"] == "require":
        return
    limit = rng.choice([{"purposes": ["x-lab"]}, {"regions": ["FR"]}, {"ends": 15}, {"starts": 45}])
    limited = {**terms, **limit}
    if limited["starts"] >= limited["ends"]:
        return
    for name in ("purposes", "regions"):
        if name in limit and terms[name] is not None:
            return
    if ("ends" in limit and terms["ends"] < 15) or ("starts" in limit and terms["starts"] > 45):
        return
    changed = [limited if other is terms else other for other in world["agreements"]]
    before = allowed(world, who, request, now)
    after = allowed({**world, "agreements": changed}, who, request, now)
    assert after <= before if terms["effect"] == "permit" else before <= after


@in_many_worlds
@seeds
def test_a_request_filter_only_takes_away(case, outcome, allowed, oracle, seed):
    world, who, request, now, rng = case(seed)
    free = {**request, "only": ["public"], "ignore": []}
    whole = {**request, "only": None, "ignore": []}
    world["tenants"][0]["default_experts"] = None
    widest = allowed(world, who, whole, now)
    assert allowed(world, who, request, now) <= widest
    required = oracle.required(world, world["tenants"][0], request["purpose"], request["region"], now)
    assert allowed(world, who, free, now) <= required
    more = {**request, "ignore": [*request["ignore"], rng.choice(["a", "b", "set:one"])]}
    result = outcome(world, who, request, now)
    if hasattr(result, "allowed"):
        assert allowed(world, who, more, now) <= set(result.allowed)


def _require(rng, worlds, world, who):
    """`world` with one more requirement of the tenant, about what no other is about."""
    terms = {**worlds.agreement(rng, "must", world["experts"]), "assignee": f"tenant:{who}", "effect": "require"}
    return {**world, "agreements": [*world["agreements"], terms]}


@in_many_worlds
@seeds
def test_no_list_set_or_filter_leaves_out_what_is_required(case, outcome, oracle, worlds, seed):
    world, who, request, now, rng = case(seed)
    world = _require(rng, worlds, world, who)
    other = worlds.tenant(rng, who)
    doors = ("mode", "expert_ids", "hidden", "listed", "default_experts")
    tenant = {**world["tenants"][0], **{name: other[name] for name in doors}}
    world["tenants"][0] = tenant
    result = outcome(world, who, {**request, **_filter(rng, worlds)}, now)
    if hasattr(result, "allowed"):
        required = oracle.required(world, tenant, request["purpose"], request["region"], now)
        excused = {"public"} if tenant["anchor_optional"] else set()
        assert required - excused <= set(result.allowed)
        assert result.required == required & set(result.allowed)


def _filter(rng, worlds):
    """A filter of listed names, so that most are more than unknown."""
    names = [*worlds.IDS, *worlds.SETS]
    return {
        "only": rng.choice([None, worlds.some(rng, names, 3)]),
        "ignore": rng.choice([[], worlds.some(rng, names, 2)]),
    }


@in_many_worlds
@seeds
def test_a_requirement_permits_nothing(case, allowed, oracle, worlds, seed):
    world, who, request, now, rng = case(seed)
    wider = _require(rng, worlds, world, who)
    request, context = {**request, "only": None}, (request["purpose"], request["region"], now)
    open_list = {**world["tenants"][0], "mode": "deny_list", "expert_ids": [], "hidden": [], "listed": worlds.IDS[1:]}
    most = oracle.entitled({**world, "tenants": [open_list]}, open_list, *context)
    assert allowed(wider, who, request, now) <= most


@in_many_worlds
@seeds
def test_nothing_is_answered_without_what_is_required(case, allowed, oracle, worlds, seed):
    """Neither while it is not loaded, nor while its owner prohibits it."""
    world, who, request, now, rng = case(seed)
    world = _require(rng, worlds, world, who)
    required = oracle.required(world, world["tenants"][0], request["purpose"], request["region"], now) - {"public"}
    for expert in [one for one in world["experts"] if one["id"] in required]:
        ban = {"id": "ban", "owner": expert["owner"], "experts": [expert["id"]], "assignee": "everyone"}
        revoked = [{**one, "live": one["live"] and one is not expert} for one in world["experts"]]
        forbidden = [*world["agreements"], {**ban, "effect": "prohibit", **EVERYTHING}]
        assert allowed({**world, "experts": revoked}, who, request, now) == set()
        assert allowed({**world, "agreements": forbidden}, who, request, now) == set()


@in_many_worlds
@seeds
def test_other_tenants_do_not_matter(case, outcome, worlds, seed):
    world, who, request, now, rng = case(seed)
    others = [worlds.tenant(rng, f"o{n}") for n in range(2)]
    terms = [
        {**worlds.agreement(rng, f"other{n}", world["experts"]), "assignee": assignee}
        for n, assignee in enumerate(["tenant:o0", "tenant:o1", "group:green"])
    ]
    crowded = {
        **world,
        "tenants": [*world["tenants"][:1], *others],
        "agreements": [*world["agreements"], *terms],
    }
    assert outcome(crowded, who, request, now) == outcome(world, who, request, now)


def _without(world, gone):
    """The same world in which the experts `gone` never existed."""
    small = copy.deepcopy(world)
    small["experts"] = [e for e in small["experts"] if e["id"] not in gone]
    small["sets"] = {n: members - gone for n, members in small["sets"].items() if members - gone}
    known = {e["id"] for e in small["experts"]} | small["sets"].keys()
    for tenant in small["tenants"]:
        for field in ("expert_ids", "hidden", "listed", "default_experts"):
            if tenant[field] is not None:
                tenant[field] = [name for name in tenant[field] if name in known]
    for terms in small["agreements"]:
        terms["experts"] = [name for name in terms["experts"] if name in known]
    small["agreements"] = [terms for terms in small["agreements"] if terms["experts"]]
    return small


@in_many_worlds
@seeds
def test_hidden_experts_cannot_be_told_from_absent_ones(case, outcome, oracle, seed):
    world, who, request, now, _ = case(seed)
    tenant = world["tenants"][0]
    gone = {e["id"] for e in world["experts"] if oracle.hidden(e, tenant, world, now)}
    one = outcome(world, who, request, now)
    assert one == outcome(_without(world, gone), who, request, now)
    nonsense = {
        **request,
        "only": request["only"] and [_mask(name, gone) for name in request["only"]],
        "ignore": [_mask(name, gone) for name in request["ignore"]],
    }
    assert one == outcome(world, who, nonsense, now)


def _mask(name, gone):
    return "nonsense" if name in gone else name


@in_many_worlds
@seeds
def test_a_decision_holds_until_it_says(case, outcome, allowed, oracle, seed):
    world, who, request, now, _ = case(seed)
    result = outcome(world, who, request, now)
    if not hasattr(result, "allowed"):
        return
    for later in [edge for edge in (10, 20, 30, 40, 50, 1e9) if edge > now]:
        if later < result.valid_until:
            assert set(result.allowed) <= allowed(world, who, request, later)
    if (end := result.valid_until) < float("inf"):
        new = oracle.required(world, world["tenants"][0], request["purpose"], request["region"], end)
        assert not set(result.allowed) <= allowed(world, who, request, end) or new - set(result.allowed)


@in_many_worlds
@seeds
def test_every_reason_names_its_expert_a_rule_and_a_way_out(case, outcome, seed):
    world, who, request, now, _ = case(seed)
    for reason in getattr(outcome(world, who, request, now), "excluded", ()):
        assert f"'{reason.expert}'" in reason.message
        assert reason.code
        assert reason.rule
        assert re.search(r"[.)] (Ask|Declare|Name|Remove|Try) .+\.$", reason.message)
