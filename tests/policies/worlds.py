"""Seeded random worlds: documents as plain dicts, and the snapshot made of the same documents."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime
from typing import Any

from flexgate.policies.agreements import Agreement
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.documents import Expert, ExpertSet, Tenant
from flexgate.policies.snapshot import Snapshot

IDS = ["public", "a", "b", "c", "d", "e"]
OWNERS = ["ann", "bob", "cyd"]
PURPOSES = ["all", "ai-all", "ai-train", "ai-input", "search", "x-lab"]
REGIONS = ["DE-BY", "DE", "FR", "EU", "NO", "EEA", "US"]
SETS = ["set:one", "set:two"]
GROUPS = ["red", "blue"]
TIMES = [10, 20, 30, 40, 50]
NOWS = [0.0, 9.999, 10.0, 15.5, 20.0, 29.999, 30.0, 40.0, 45.0, 50.0, 99.0]

World = dict[str, Any]
Request = dict[str, Any]


def some(rng: random.Random, pool: list[str], most: int) -> list[str]:
    return rng.sample(pool, rng.randint(0, min(most, len(pool))))


def random_world(rng: random.Random) -> World:
    experts = [
        {
            "id": id_,
            "owner": rng.choice(OWNERS),
            "live": rng.random() < (0.98 if id_ == "public" else 0.85),
            "visibility": "hidden" if id_ != "public" and rng.random() < 0.15 else "listed",
            "required": rng.random() < 0.08,
        }
        for id_ in IDS
    ]
    sets = {name: set(rng.sample(IDS[1:], rng.randint(1, 3))) for name in SETS}
    tenants = [tenant(rng, f"t{n}") for n in range(rng.randint(1, 3))]
    agreements = [agreement(rng, f"g{n}", experts) for n in range(rng.choice([0, 2, 5, 9, 12]))]
    return {"experts": experts, "sets": sets, "tenants": tenants, "agreements": agreements}


def disown(rng: random.Random, world: World) -> World:
    """Take the owners of some experts away; agreements go on naming them."""
    for expert in world["experts"]:
        if rng.random() < 0.3:
            expert["owner"] = None
    return world


def thin(rng: random.Random, world: World) -> World:
    """Take some experts out of some of three layers."""
    for expert in world["experts"]:
        expert["empty_layers"] = rng.sample(range(3), rng.choice([0, 1, 1, 2, 3]))
    return world


def grade(rng: random.Random, world: World) -> World:
    """Grade the experts; some tenants demand a grade."""
    grades = ["unknown", "shared", "router", "removed"]
    for expert in world["experts"]:
        expert["grade"] = rng.choice(grades[rng.choice([0, 2, 3]) :])
    for one in world["tenants"]:
        one["min_grade"] = rng.choice([None, *grades[1:]])
    return world


def tenant(rng: random.Random, id_: str) -> dict[str, Any]:
    names = IDS[1:] + SETS
    return {
        "id": id_,
        "mode": rng.choice(["allow_list", "deny_list", "deny_list"]),
        "expert_ids": some(rng, names, 3),
        "hidden": some(rng, names, 1),
        "listed": some(rng, names, 2),
        "default_experts": some(rng, ["public", *names], 4) if rng.random() < 0.2 else None,
        "anchor_optional": rng.random() < 0.5,
        "groups": some(rng, GROUPS, 2),
        "purposes": some(rng, PURPOSES, 6),
        "regions": some(rng, REGIONS, 7),
        "archived": rng.random() < 0.03,
    }


def agreement(rng: random.Random, id_: str, experts: list[dict[str, Any]]) -> dict[str, Any]:
    """Mostly about experts of its owner; an owner without any names what is not its own."""
    owner = rng.choice(OWNERS)
    own = [e["id"] for e in experts if e["owner"] == owner and e["id"] != "public"]
    pool = own if own and rng.random() < 0.8 else IDS[1:] + SETS
    starts, ends = rng.choice([-math.inf, *TIMES]), rng.choice([*TIMES, math.inf, math.inf])
    if starts >= ends:
        starts, ends = (ends, starts) if ends < starts and starts < math.inf else (starts, math.inf)
    return {
        "id": id_,
        "owner": owner,
        "experts": rng.sample(pool, rng.randint(1, min(4, len(pool)))),
        "assignee": rng.choice(["everyone", "everyone", "tenant:t0", "tenant:t1", "group:red"]),
        "effect": rng.choice(["permit"] * 10 + ["prohibit"] * 2 + ["require"]),
        "purposes": rng.sample(PURPOSES, rng.randint(1, 3)) if rng.random() < 0.3 else None,
        "regions": rng.sample(REGIONS, rng.randint(1, 3)) if rng.random() < 0.3 else None,
        "starts": starts,
        "ends": ends,
    }


def random_request(rng: random.Random) -> Request:
    names = [*IDS, *SETS, "nonsense"]
    return {
        "purpose": rng.choice([None, None, *PURPOSES]),
        "region": rng.choice([None, None, *REGIONS]),
        "only": some(rng, names, 3) if rng.random() < 0.3 else None,
        "ignore": some(rng, names, 2) if rng.random() < 0.3 else [],
    }


def snapshot_of(world: World, version: int = 1) -> Snapshot:
    return Snapshot.build(
        policy_version=version,
        experts=[Expert.model_validate(e) for e in world["experts"]],
        sets=[ExpertSet(id=name, experts=members) for name, members in world["sets"].items()],
        tenants=[Tenant.model_validate({"name": "T", **t}) for t in world["tenants"]],
        agreements=[agreement_of(a) for a in world["agreements"]],
    )


def agreement_of(agreement: dict[str, Any]) -> Agreement:
    fields = {name: value for name, value in agreement.items() if name not in ("starts", "ends")}
    return Agreement.model_validate(
        {**fields, "not_before": _moment(agreement["starts"]), "not_after": _moment(agreement["ends"])}
    )


def _moment(seconds: float) -> datetime | None:
    return None if math.isinf(seconds) else datetime.fromtimestamp(seconds, UTC)


def request_of(request: Request) -> DecisionRequest:
    return DecisionRequest(
        decision_id="d",
        purpose=request["purpose"],
        region=request["region"],
        only=None if request["only"] is None else tuple(request["only"]),
        ignore=tuple(request["ignore"]),
    )
