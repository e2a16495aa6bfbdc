"""A snapshot that follows the store change by change equals one that is read whole."""

from __future__ import annotations

import contextlib
import random

import pytest
import sqlalchemy as sa

from flexgate.policies.agreements import Agreement
from flexgate.policies.documents import Expert, ExpertSet, Role, Tenant
from flexgate.policies.errors import ChangeRefused, StoreDamaged
from flexgate.policies.store import Change, Store, schema, snapshots

NAMES = ["news", "math", "code", "legal"]
SETS = ["set:one", "set:two"]
GOING = ["n1", "n2"]


def _step(change: Change, rng: random.Random) -> None:
    """One thing that an administrator might do; what does not fit is refused by the store."""
    references = rng.sample(
        NAMES + SETS + [expert for expert in GOING if change.get(Expert, expert)], rng.randint(0, 3)
    )
    match rng.randrange(8):
        case 0:
            change.put(ExpertSet(id=rng.choice(SETS), experts=frozenset(rng.sample(NAMES, 2))))
        case 1:
            change.remove(ExpertSet, rng.choice(SETS))
        case 2:
            expert = change.get(Expert, rng.choice(NAMES))
            assert expert is not None
            live, visibility = rng.random() < 0.5, rng.choice(["listed", "hidden"])
            change.put(expert.model_copy(update={"live": live, "visibility": visibility}))
        case 3:
            id_ = rng.choice(GOING)
            if rng.random() < 0.5:
                change.remove(Expert, id_)
            change.put(Expert(id=id_, owner=rng.choice(["wire", "forge"])))
        case 4 | 5:
            field = rng.choice(["expert_ids", "hidden", "listed", "default_experts"])
            change.put(Tenant(id=rng.choice("xyz"), name="T", **{field: frozenset(references)}))
        case 6:
            id_ = rng.choice("ab")
            if rng.random() < 0.3:
                change.remove(Agreement, id_)
            assignee = rng.choice(["everyone", "group:g", "tenant:x"])
            effect = rng.choice(["permit", "prohibit"])
            version = change.next_agreement_version(id_)
            experts = frozenset(rng.choice([["news"], ["code", "legal"], references or ["math"], GOING[:1]]))
            owner = rng.choice(["wire", "forge"])
            terms = {"id": id_, "version": version, "owner": owner, "experts": experts}
            change.put(Agreement.model_validate({**terms, "assignee": assignee, "effect": effect}))
        case _:
            key = change.mint_key(Role.TENANT, tenant_id=rng.choice("xyz"))
            if rng.random() < 0.5:
                change.revoke_key(key.record.key_id)


@pytest.mark.parametrize("seed", range(6))
def test_following_the_store_equals_reading_it_whole(store: Store, seed: int) -> None:
    rng = random.Random(seed)
    known, done = store.confirm(None), 0
    for at in range(40):
        with contextlib.suppress(ChangeRefused), store.change(actor="tester", at=2.0 + at) as change:
            for _ in range(rng.randint(1, 3)):
                _step(change, rng)
        if rng.random() < 0.6:
            followed, whole = store.confirm(known), store.snapshot()
            done += followed is not known
            assert followed == whole
            assert followed.catalogue == whole.catalogue
            known = followed
    assert done > 8


def test_a_set_that_changes_reaches_everything_that_names_it(store: Store) -> None:
    terms = {"id": "a", "owner": "forge", "experts": ["set:two"], "assignee": "everyone", "effect": "permit"}
    with store.change(actor="tester", at=2.0) as change:
        change.put(ExpertSet(id="set:two", experts=frozenset({"code"})))
        change.put(Tenant(id="acme", name="Acme", expert_ids=frozenset({"set:two"})))
        change.put(Agreement.model_validate(terms))
    known = store.confirm(None)
    with store.change(actor="tester", at=3.0) as change:
        change.put(ExpertSet(id="set:two", experts=frozenset({"legal"})))
    after = store.confirm(known)
    assert after.tenants["acme"].named == {"legal"}
    assert set(after.agreements["everyone"].unlimited) == {"legal"}


def test_more_sets_than_one_query_can_name_are_followed(store: Store) -> None:
    known = store.confirm(None)
    for at, expert in ((2.0, "code"), (3.0, "legal")):
        with store.change(actor="tester", at=at) as change:
            for number in range(1_100):
                change.put(ExpertSet(id=f"set:s{number}", experts=frozenset({expert})))
        known = store.confirm(known)
    assert known == store.snapshot()


def test_a_change_is_read_without_reading_the_rest(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    known = store.confirm(None)
    with store.change(actor="tester", at=2.0) as change:
        change.put(Tenant(id="acme", name="Acme"))
        change.mint_key(Role.TENANT, tenant_id="acme")
        change.put(Expert(id="math", owner="wire"))
        change.remove(Expert, "news")

    def refuse(*_: object) -> None:
        raise AssertionError("everything was read")

    monkeypatch.setattr(snapshots, "read_all", refuse)
    after = store.confirm(known)
    assert after.tenants["acme"].name == "Acme"
    assert [key.tenant_id for key in after.keys.values()] == ["acme"]
    assert after.experts["math"].owner == "wire"
    assert "news" not in after.experts


def test_a_revision_that_no_longer_parses_or_fits_is_refused(store: Store) -> None:
    known = store.confirm(None)
    with store.change(actor="tester", at=2.0) as change:
        change.put(Tenant(id="acme", name="Acme", expert_ids=frozenset({"news"})))
    for after in ({"id": "acme", "is": "bad"}, {"id": "acme", "name": "Acme", "expert_ids": ["nonsense"]}):
        with store.engine.begin() as connection:
            connection.execute(sa.update(schema.policy_changes).values(after=after))
        with pytest.raises(StoreDamaged):
            store.confirm(known)
