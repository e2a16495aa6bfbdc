"""What is written comes back, in one transaction with its revision, or not at all."""

from __future__ import annotations

import hashlib
import math
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from flexgate.policies.agreements import Agreement
from flexgate.policies.decide import decide
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.documents import Expert, ExpertSet, Role, Tenant
from flexgate.policies.errors import (
    ChangeRefused,
    StoreDamaged,
    StoreFromNewerVersion,
    StoreUnavailable,
)
from flexgate.policies.store import Store, schema
from flexgate.policies.store.agreements import revise_agreement

ACME = Tenant(id="acme", name="Acme", expert_ids=frozenset({"news"}))
TERMS = Agreement(id="a1", owner="wire", experts=frozenset({"news"}), assignee="tenant:acme", effect="permit")


def _put(store: Store, *documents, at: float = 2.0) -> None:
    with store.change(actor="tester", at=at) as change:
        for document in documents:
            change.put(document)


def test_stored_policy_decides_like_the_documents_in_memory(store):
    _put(store, ACME, TERMS)
    snapshot = store.snapshot()
    decision = decide(snapshot, "acme", DecisionRequest(decision_id="d"), 5.0)
    assert decision.allowed == ("public", "news")
    assert decision.policy_version == store.version() == 2


def test_experts_keep_the_order_in_which_they_came(store):
    _put(store, Expert(id="aaa", owner="wire"), Expert(id="code", owner="forge", domain="python"))
    assert list(store.snapshot().experts) == ["public", "news", "math", "code", "legal", "aaa"]


def test_full_documents_survive_the_round_trip(store):
    tenant = Tenant(
        id="full",
        name="Full",
        mode="deny_list",
        expert_ids=frozenset({"set:two", "math"}),
        hidden=frozenset({"legal"}),
        listed=frozenset({"code"}),
        default_experts=frozenset({"news"}),
        anchor_optional=True,
        groups=frozenset({"press"}),
        purposes=frozenset({"search"}),
        regions=frozenset({"DE"}),
    )
    terms = Agreement.model_validate(
        {
            "id": "full",
            "owner": "forge",
            "experts": ["set:two"],
            "assignee": "group:press",
            "effect": "prohibit",
            "purposes": ["ai-train"],
            "regions": ["EU"],
            "not_before": "2026-01-01T00:00:00Z",
            "not_after": "2027-01-01T00:00:00Z",
        }
    )
    two = ExpertSet(id="set:two", experts=frozenset({"code", "legal"}))
    _put(store, two, tenant, terms)
    with store.change(actor="reader", at=3.0) as change:
        assert change.get(Tenant, "full") == tenant
        assert change.get(Agreement, "full") == terms
        assert change.get(ExpertSet, "set:two") == two
        assert change.get(Tenant, "nobody") is None


def test_change_that_changes_nothing_makes_no_revision(store):
    _put(store, ACME)
    version = store.version()
    _put(store, ACME)
    assert store.version() == version


def test_failed_change_leaves_nothing_behind(store):
    version = store.version()
    with pytest.raises(ChangeRefused):
        _put(store, ACME, TERMS.model_copy(update={"assignee": "tenant:nobody"}))
    assert store.version() == version
    assert "acme" not in store.snapshot().tenants


REFUSED = [
    ("unknown expert", TERMS.model_copy(update={"experts": frozenset({"nonsense"})})),
    ("unknown set", TERMS.model_copy(update={"experts": frozenset({"set:nonsense"})})),
    ("someone else's expert", TERMS.model_copy(update={"experts": frozenset({"news", "math"})})),
    ("unknown tenant", TERMS.model_copy(update={"assignee": "tenant:nobody"})),
    ("other terms, same version", TERMS.model_copy(update={"effect": "prohibit"})),
    ("tenant with unknown expert", Tenant(id="t", name="T", expert_ids=frozenset({"nonsense"}))),
    ("tenant with unknown set", Tenant(id="t", name="T", hidden=frozenset({"set:nonsense"}))),
    ("set with unknown expert", ExpertSet(id="set:x", experts=frozenset({"nonsense"}))),
    ("public hidden", Expert(id="public", owner="commons", visibility="hidden")),
    ("new owner under old terms", Expert(id="news", owner="forge")),
]


@pytest.mark.parametrize("document", [d for _, d in REFUSED], ids=[why for why, _ in REFUSED])
def test_document_that_does_not_fit_is_refused(store, document):
    _put(store, ACME, TERMS)
    before = store.snapshot()
    with pytest.raises(ChangeRefused):
        _put(store, document)
    assert store.snapshot() == before


def test_removal_is_refused_while_something_names_the_object(store):
    two = ExpertSet(id="set:two", experts=frozenset({"code", "legal"}))
    _put(store, ACME, TERMS, two)
    for kind, id_ in ((Expert, "news"), (Expert, "code"), (Expert, "public"), (Tenant, "acme")):
        with pytest.raises(ChangeRefused), store.change(actor="t", at=3.0) as change:
            change.remove(kind, id_)
    with pytest.raises(ChangeRefused), store.change(actor="t", at=3.0) as change:
        change.remove(Agreement, "nonsense")


def test_removed_agreement_no_longer_permits(store):
    _put(store, ACME, TERMS)
    with store.change(actor="wire", at=3.0) as change:
        change.remove(Agreement, "a1")
    decision = decide(store.snapshot(), "acme", DecisionRequest(decision_id="d"), 5.0)
    assert decision.allowed == ("public",)


def test_minted_key_is_kept_as_a_hash_only(store):
    _put(store, ACME)
    with store.change(actor="t", at=3.0) as change:
        minted = change.mint_key(Role.TENANT, tenant_id="acme", expires=9.0)
    assert minted.secret.startswith(minted.record.prefix + "-")
    assert len(minted.secret.removeprefix(minted.record.prefix + "-")) == 43
    digest = hashlib.sha256(minted.secret.encode()).digest()
    assert store.snapshot().keys[digest] == minted.record
    assert minted.secret not in repr(minted)


def test_minted_key_is_nowhere_in_the_database_file(store, sqlite_file):
    with store.change(actor="t", at=3.0) as change:
        minted = change.mint_key(Role.ADMIN)
    folder = Path(sqlite_file).parent
    stored = b"".join(path.read_bytes() for path in folder.iterdir())
    assert minted.record.prefix.encode() in stored
    assert minted.secret[-43:].encode() not in stored


def test_minted_keys_differ(store):
    with store.change(actor="t", at=3.0) as change:
        minted = [change.mint_key(Role.ADMIN) for _ in range(50)]
    assert len({m.secret for m in minted}) == len({m.record.key_id for m in minted}) == 50


def test_revoking_a_key_is_for_good(store):
    with store.change(actor="t", at=3.0) as change:
        minted = change.mint_key(Role.ADMIN)
    for at in (4.0, 5.0):
        with store.change(actor="t", at=at) as change:
            assert change.revoke_key(minted.record.key_id).revoked == 4.0
    assert store.keys()[0].revoked == 4.0
    with pytest.raises(ChangeRefused), store.change(actor="t", at=6.0) as change:
        change.revoke_key("key_nonsense")


@pytest.mark.parametrize(
    "key",
    [
        {"role": Role.TENANT},
        {"role": Role.TENANT, "tenant_id": "nobody"},
        {"role": Role.TENANT, "tenant_id": "old"},
        {"role": Role.TENANT, "tenant_id": "acme", "owner_id": "wire"},
        {"role": Role.ADMIN, "tenant_id": "acme"},
        {"role": Role.OWNER},
        {"role": Role.TENANT, "tenant_id": "acme", "expires": 3.0},
    ],
)
def test_key_that_does_not_fit_is_refused(store, key):
    _put(store, ACME, Tenant(id="old", name="Old", archived=True))
    with pytest.raises(ChangeRefused), store.change(actor="t", at=3.0) as change:
        change.mint_key(**key)
    assert store.keys() == []


def test_migrating_again_changes_nothing(store):
    before = store.snapshot()
    store.migrate()
    assert store.snapshot() == before


def test_migrations_make_the_tables_that_the_code_expects(empty):
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    with empty.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []


def test_schema_of_a_newer_version_is_refused(empty):
    with empty.engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreFromNewerVersion, match="9999"):
        empty.migrate()


def test_document_that_no_longer_parses_is_refused(store):
    _put(store, ACME)
    with store.engine.begin() as connection:
        connection.execute(sa.update(schema.tenants).values(document={"id": "acme", "is": "bad"}))
    with pytest.raises(StoreDamaged):
        store.snapshot()


@pytest.mark.parametrize(("effect", "limited"), [("permit", False), ("prohibit", True)])
def test_stored_terms_with_duties_that_cannot_be_executed_permit_nothing_and_still_prohibit(store, effect, limited):
    terms = {"id": "a", "owner": "wire", "experts": ["news"], "assignee": "everyone", "effect": effect}
    _put(store, Agreement.model_validate(terms), ACME)
    with store.engine.begin() as connection:
        stored = {**terms, "duties": [{"kind": "attribute"}, {"kind": "attribute"}]}
        connection.execute(sa.update(schema.agreements).values(document=stored))
    snapshot = store.snapshot()
    assert "news" in snapshot.agreements["everyone"].limited if limited else "everyone" not in snapshot.agreements
    with pytest.raises(ChangeRefused, match=r"'duties': (a prohibition has no duties|'duties' has 'attribute' twice)"):
        revise_agreement(store, "a", {**terms, "duties": stored["duties"]}, actor="t", at=9.0)


@pytest.mark.parametrize("table", [schema.tenants, schema.agreements])
def test_a_stored_document_with_a_key_twice_is_refused(store, table):
    terms = {"id": "a", "owner": "wire", "experts": ["news"], "assignee": "everyone", "effect": "prohibit"}
    _put(store, Agreement.model_validate(terms), ACME)
    with store.engine.begin() as connection:
        text = connection.execute(sa.text(f"SELECT CAST(document AS TEXT) FROM {table.name}")).scalar_one()
        connection.execute(
            sa.text(f"UPDATE {table.name} SET document = :d"), {"d": text.replace("{", '{"id": "x", ', 1)}
        )
    with pytest.raises(StoreDamaged, match="the key 'id' is given twice"):
        store.snapshot()


def test_documents_that_no_longer_fit_together_are_refused(store):
    _put(store, ACME)
    with store.engine.begin() as connection:
        connection.execute(sa.delete(schema.experts).where(schema.experts.c.id == "news"))
    with pytest.raises(StoreDamaged):
        store.snapshot()


def test_store_without_experts_gives_no_snapshot(empty):
    with pytest.raises(StoreDamaged):
        empty.snapshot()


@pytest.mark.parametrize("url", ["nonsense", "nonsense://x", "sqlite:////nonexistent/dir/p.db"])
def test_url_that_cannot_be_used(url):
    with pytest.raises(StoreUnavailable):
        Store.open(url).migrate()


def test_file_that_is_no_database(tmp_path):
    path = tmp_path / "policy.db"
    path.write_bytes(b"this is not a database" * 100)
    with pytest.raises(StoreUnavailable):
        Store.open(f"sqlite:///{path}").migrate()


def test_writers_take_turns_and_every_change_has_its_own_version(store, url):
    def work(name: str) -> None:
        mine = Store.open(url)
        for number in range(5):
            _put(mine, Tenant(id=f"{name}-{number}", name=name))
        mine.close()

    threads = [threading.Thread(target=work, args=(f"t{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.version() == 21
    assert len(store.snapshot().tenants) == 20


def test_locked_database_is_reported_as_unavailable(store, url, monkeypatch):
    from flexgate.policies.store import database

    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 10)
    other = Store.open(url)
    with store.change(actor="t", at=2.0), pytest.raises(StoreUnavailable):
        _put(other, ACME)
    other.close()


def test_snapshot_reads_one_state_while_another_process_writes(store, url):
    other = Store.open(url)
    with other.change(actor="t", at=2.0) as change:
        change.put(ACME)
        assert "acme" not in store.snapshot().tenants
    assert store.snapshot().tenants["acme"].name == "Acme"
    assert store.snapshot().policy_version == 2
    other.close()


def test_valid_until_survives_the_store(store):
    _put(store, ACME, TERMS)
    decision = decide(store.snapshot(), "acme", DecisionRequest(decision_id="d"), 5.0)
    assert decision.valid_until == math.inf
