"""Cedar as a second oracle, for the part of the policy that it can express: agreements.

Every agreement becomes one Cedar policy. Cedar skips a policy whose condition errors, which would
turn a prohibition into a permission, so any diagnostic counts as a failure here.
"""

from __future__ import annotations

import math
import random

import cedarpy
import pytest

from flexgate.policies.decide import declared_context, find_tenant
from flexgate.policies.entitlements import entitlements

ABOVE = {
    "ai-train": ["ai-train", "ai-all", "all"],
    "ai-input": ["ai-input", "ai-all", "all"],
    "search": ["search", "all"],
    "x-lab": ["x-lab", "all"],
}


def _policy(terms):
    head = "permit" if terms["effect"] == "permit" else "forbid"
    kind, _, name = terms["assignee"].partition(":")
    principal = {
        "everyone": "principal",
        "tenant": f'principal == Tenant::"{name}"',
        "group": f'principal in Group::"{name}"',
    }[kind]
    named = ", ".join(f'Expert::"{x}", Set::"{x}"' for x in terms["experts"])
    conditions = [f'resource in [{named}] && resource.owner == "{terms["owner"]}"']
    if terms["purposes"] is not None:
        words = ", ".join(f'"{word}"' for word in terms["purposes"])
        matches = f"context.purposes.containsAny([{words}])"
        conditions.append(matches if head == "permit" else f"(!context.declared || {matches})")
    if terms["starts"] > -math.inf:
        conditions.append(f"context.now >= {int(terms['starts'])}")
    if terms["ends"] < math.inf:
        conditions.append(f"context.now < {int(terms['ends'])}")
    return f"{head} ({principal}, action, resource) when {{ {' && '.join(conditions)} }};"


def _entities(world):
    def ref(kind, name):
        return {"type": kind, "id": name}

    tenants = [
        {
            "uid": ref("Tenant", t["id"]),
            "attrs": {},
            "parents": [ref("Group", g) for g in t["groups"]],
        }
        for t in world["tenants"]
    ]
    experts = [
        {
            "uid": ref("Expert", e["id"]),
            "attrs": {"owner": e["owner"]},
            "parents": [ref("Set", n) for n, members in world["sets"].items() if e["id"] in members],
        }
        for e in world["experts"]
    ]
    return tenants + experts


@pytest.mark.parametrize("seed", range(60))
def test_cedar_agrees_on_agreements(worlds, seed):
    rng = random.Random(seed)
    world = worlds.random_world(rng)
    for expert in world["experts"]:
        expert.update(live=True, visibility="listed")
    for tenant in world["tenants"]:
        tenant.update(mode="deny_list", expert_ids=[], hidden=[], archived=False)
        tenant["purposes"] = list(ABOVE)
    for terms in world["agreements"]:
        terms["regions"] = None
        if terms["purposes"] is not None and terms["effect"] == "prohibit":
            terms["purposes"] = [p for p in terms["purposes"] if p in ABOVE] or ["search"]
    snapshot = worlds.snapshot_of(world)
    policies = "\n".join(_policy(terms) for terms in world["agreements"] if terms["effect"] != "require")
    experts = [e["id"] for e in world["experts"] if e["id"] != "public"]
    for now in (5, 10, 25, 30, 60):
        purpose = rng.choice([None, *ABOVE])
        tenant = find_tenant(snapshot, "t0")
        ours = entitlements(snapshot, tenant, declared_context(tenant, purpose, None), now).lost_at
        context = {
            "purposes": ABOVE.get(purpose, ["all"]),
            "declared": purpose is not None,
            "now": now,
        }
        requests = [
            {
                "principal": 'Tenant::"t0"',
                "action": 'Action::"use"',
                "resource": f'Expert::"{expert}"',
                "context": context,
            }
            for expert in experts
        ]
        answers = cedarpy.is_authorized_batch(requests, policies, _entities(world))
        assert not any(answer.diagnostics.errors for answer in answers)
        theirs = {e for e, answer in zip(experts, answers, strict=True) if answer.allowed}
        assert theirs == set(ours) - {"public"}, (policies, now, purpose)
