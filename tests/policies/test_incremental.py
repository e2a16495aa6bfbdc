"""A snapshot that was revised equals the one that is built whole."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgate.policies.agreements import Agreement
from flexgate.policies.documents import Expert, ExpertSet, KeyRecord, Role, Tenant
from flexgate.policies.errors import SnapshotInvalid
from flexgate.policies.incremental import Edit, revise

KEY = KeyRecord(key_id="k", sha256=b"1" * 32, prefix="sk-1", role=Role.TENANT, tenant_id="acme", created=0.0)
PUBLIC = Expert(id="public", owner="commons")


def _changed_world(rng, worlds, before):
    """The same world with one to four things new, other or gone. Of experts only the new ones go or change hands."""
    world = copy.deepcopy(before)
    for _ in range(rng.randint(1, 4)):
        what = rng.choice(
            ["expert", "new expert", "moved expert", "set", "tenant", "new tenant", "agreement", "no agreement"]
        )
        some = rng.randrange(10**6)
        new = [expert for expert in world["experts"] if expert["id"] not in worlds.IDS]
        if what == "expert":
            expert = rng.choice(world["experts"])
            expert["live"] = rng.random() < 0.5
            expert["visibility"] = "listed" if expert["id"] == "public" else rng.choice(["listed", "hidden"])
        elif what == "new expert":
            visibility = rng.choice(["listed", "hidden"])
            world["experts"].append({"id": f"n{some}", "owner": "ann", "live": True, "visibility": visibility})
        elif what == "moved expert" and new:
            expert = rng.choice(new)
            world["agreements"] = [a for a in world["agreements"] if expert["id"] not in a["experts"]]
            if rng.random() < 0.5:
                world["experts"].remove(expert)
            else:
                expert["owner"] = rng.choice(worlds.OWNERS)
                terms = worlds.agreement(rng, f"n{some}", [])
                world["agreements"].append({**terms, "owner": expert["owner"], "experts": [expert["id"]]})
        elif what == "set":
            world["sets"][rng.choice([*world["sets"], f"set:n{some}"])] = set(rng.sample(worlds.IDS[1:], 2))
        elif what == "tenant":
            place = rng.randrange(len(world["tenants"]))
            world["tenants"][place] = worlds.tenant(rng, world["tenants"][place]["id"])
        elif what == "new tenant":
            world["tenants"].append(worlds.tenant(rng, f"n{some}"))
        elif what == "agreement":
            id_ = rng.choice([*(a["id"] for a in world["agreements"]), f"n{some}"])
            world["agreements"] = [a for a in world["agreements"] if a["id"] != id_]
            world["agreements"].append(worlds.agreement(rng, id_, world["experts"]))
        elif world["agreements"]:
            world["agreements"].remove(rng.choice(world["agreements"]))
    return world


def _documents(worlds, world):
    """Every kind's documents by id."""
    return {
        "experts": {e["id"]: Expert.model_validate(e) for e in world["experts"]},
        "sets": {name: ExpertSet(id=name, experts=members) for name, members in world["sets"].items()},
        "tenants": {t["id"]: Tenant.model_validate({"name": "T", **t}) for t in world["tenants"]},
        "agreements": {a["id"]: worlds.agreement_of(a) for a in world["agreements"]},
    }


def _edits(before, after):
    """What differs, and what names a set that differs."""
    edits = {
        kind: [
            Edit(id_, before[kind].get(id_), after[kind].get(id_))
            for id_ in {**before[kind], **after[kind]}
            if before[kind].get(id_) != after[kind].get(id_)
        ]
        for kind in before
    }
    changed = {edit.id for edit in edits["sets"]}
    for kind, fields in (
        ("tenants", ("expert_ids", "hidden", "listed", "default_experts")),
        ("agreements", ("experts",)),
    ):
        for id_, document in after[kind].items():
            if any(changed & (getattr(document, field) or set()) for field in fields):
                edits[kind].append(Edit(id_, document, document))
    return edits


@settings(max_examples=300, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_revising_equals_building_whole(worlds, seed):
    rng = random.Random(seed)
    world = worlds.random_world(rng)
    snapshot = worlds.snapshot_of(world)
    for version in range(2, 6):
        after = _changed_world(rng, worlds, world)
        edits = _edits(_documents(worlds, world), _documents(worlds, after))
        snapshot = revise(snapshot, policy_version=version, made=0.0, **edits)
        whole = worlds.snapshot_of(after, version)
        assert snapshot == whole
        assert snapshot.catalogue == whole.catalogue
        assert snapshot.hidden == whole.hidden
        world = after


def test_what_is_not_touched_is_kept_as_it_is(world):
    agreements = [world.agreement("a"), world.agreement("b", assignee="tenant:acme")]
    before = world.build(agreements, [world.tenant(), world.tenant(id="other")])
    edit = Edit("acme", None, Tenant(id="acme", name="New"))
    after = revise(before, policy_version=8, made=5.0, tenants=[edit])
    assert after.tenants["acme"].name == "New"
    assert after.tenants["other"] is before.tenants["other"]
    assert all(after.agreements[assignee] is before.agreements[assignee] for assignee in ("everyone", "tenant:acme"))
    assert (after.policy_version, after.made) == (8, 5.0)
    assert before.tenants["acme"].name == "Acme"


def test_steps_of_one_document_count_as_one(world):
    """The second tenant names a set that has gone by the end."""
    two = ExpertSet(id="set:two", experts={"code", "legal"})
    steps = [
        Tenant(id="acme", name="A", expert_ids={"set:two"}),
        Tenant(id="acme", name="B", expert_ids={"news"}),
    ]
    after = revise(
        world.build(),
        policy_version=8,
        made=0.0,
        sets=[Edit("set:two", None, two), Edit("set:two", two, None)],
        tenants=[Edit("acme", None, steps[0]), Edit("acme", *steps)],
    )
    assert after.tenants["acme"].named == {"news"}
    assert not after.sets


def test_an_expert_that_goes_comes_back_at_the_end_and_under_another_owner(world):
    """Its former owner's terms are gone, and the new one's hold."""
    news, other = Expert(id="news", owner="wire"), Expert(id="news", owner="forge")
    permit = Agreement.model_validate(world.agreement("a"))
    before = world.build([world.agreement("a")])
    gone = revise(
        before, policy_version=8, made=0.0, experts=[Edit("news", news, None)], agreements=[Edit("a", permit, None)]
    )
    assert "news" not in gone.experts
    assert not gone.agreements
    back = permit.model_copy(update={"owner": "forge", "version": 2})
    after = revise(
        before,
        policy_version=9,
        made=0.0,
        experts=[Edit("news", news, None), Edit("news", None, other)],
        agreements=[Edit("a", permit, back)],
    )
    assert list(after.experts)[-1] == "news"
    (compiled,) = after.agreements["everyone"].unlimited["news"]
    assert compiled.version == 2


@pytest.mark.parametrize(
    "broken",
    [
        {"tenants": [Edit("t", None, Tenant(id="t", name="T", expert_ids={"nonsense"}))]},
        {"tenants": [Edit("acme", Tenant(id="acme", name="Acme"), None)]},
        {"sets": [Edit("set:x", None, ExpertSet(id="set:x", experts={"nonsense"}))]},
        {"experts": [Edit("public", PUBLIC, Expert(id="public", owner="commons", visibility="hidden"))]},
        {"keys": [replace(KEY, tenant_id="nobody")]},
        {"keys": [KEY, replace(KEY, key_id="other")]},
    ],
)
def test_edits_that_do_not_fit_are_refused(world, broken):
    with pytest.raises(SnapshotInvalid):
        revise(world.build(), policy_version=8, made=0.0, **broken)


def test_a_key_is_added_and_then_revoked(world):
    snapshot = revise(world.build(), policy_version=8, made=0.0, keys=[KEY])
    assert snapshot.keys == {KEY.sha256: KEY}
    revoked = replace(KEY, revoked=3.0)
    assert revise(snapshot, policy_version=9, made=0.0, keys=[revoked]).keys == {KEY.sha256: revoked}
