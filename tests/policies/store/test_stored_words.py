"""Words that no list has any more: what is stored with them is served, strictly, and can be changed and taken back."""

from __future__ import annotations

import json

import pytest
import sqlalchemy as sa

from flexgate.policies import vocabulary
from flexgate.policies.agreements import Agreement
from flexgate.policies.decide import decide
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.documents import Tenant
from flexgate.policies.errors import ChangeRefused
from flexgate.policies.store import gitops, schema
from flexgate.policies.store.agreements import revise_agreement, terminate_agreement
from flexgate.policies.store.history import roll_back
from flexgate.policies.store.projects import archive_project, update_project

ACME = Tenant(id="acme", name="Acme", expert_ids=frozenset({"news"}), regions=frozenset({"DE", "DE-BY", "FR"}))
TERMS = {"id": "a", "owner": "wire", "experts": ["news"], "assignee": "everyone", "effect": "permit"}
OLD_TENANT = {"name": "Ac\tme", "regions": ["DE", "DE-BY", "DE-ZZ", "FR"]}
OLD_TERMS = {
    "regions": ["DE-ZZ"],
    "license_expression": "Proprietary",
    "duties": [{"kind": "attribute"}, {"kind": "attribute"}],
}
PAID = {"kind": "compensate", "rate": "1", "unit": "request"}
ADMIN = {"actor": "t", "at": 9.0}


def put(store, *documents):
    with store.change(actor="t", at=1.0) as change:
        for document in documents:
            change.put(document)


def age(store, kind, table, fields):
    """Change what is stored of a kind, now and in the history, to what an earlier version wrote."""
    with store.engine.begin() as connection:
        for row in connection.execute(sa.select(table)).all():
            connection.execute(sa.update(table).values(document={**row.document, **fields}))
        changes = schema.policy_changes
        for row in connection.execute(sa.select(changes).where(changes.c.kind == kind)).all():
            where = changes.c.version == row.version, changes.c.ordinal == row.ordinal
            after = row.after and {**row.after, **fields}
            before = row.before and {**row.before, **fields}
            connection.execute(sa.update(changes).where(*where).values(before=before, after=after))


@pytest.fixture
def aged(store):
    """A tenant and terms with words that were accepted once."""
    put(store, ACME, Agreement.model_validate(TERMS))
    age(store, "tenant", schema.tenants, OLD_TENANT)
    age(store, "agreement", schema.agreements, OLD_TERMS)
    return store


def allowed(store, region=None):
    return "news" in decide(store.snapshot(), "acme", DecisionRequest(decision_id="d", region=region), 100.0).allowed


def test_a_store_with_words_of_earlier_lists_is_read(aged):
    assert aged.snapshot().tenants["acme"].regions == {"DE", "DE-BY", "DE-ZZ", "FR"}
    assert aged.confirm(None).policy_version == aged.version()


@pytest.mark.parametrize("region", [None, "DE", "DE-BY", "FR"])
def test_a_permission_for_a_region_that_is_unknown_permits_nothing(store, region):
    put(store, ACME, Agreement.model_validate(TERMS))
    assert allowed(store, region)
    age(store, "agreement", schema.agreements, {"regions": ["DE-ZZ"]})
    assert not allowed(store, region)


@pytest.mark.parametrize(
    ("unknown", "reached"),
    [("DE-ZZ", {None, "DE", "DE-BY"}), ("ZZ", {None, "DE", "DE-BY", "FR"}), ("ZZ-A", {None, "DE", "DE-BY", "FR"})],
)
def test_a_prohibition_for_a_region_that_is_unknown_reaches_all_that_it_may_mean(store, unknown, reached):
    ban = {**TERMS, "id": "ban", "effect": "prohibit", "regions": ["FR-75C"]}
    put(store, ACME, Agreement.model_validate(TERMS), Agreement.model_validate(ban))
    with store.engine.begin() as connection:
        table = schema.agreements
        stored = {**ban, "regions": [unknown]}
        connection.execute(sa.update(table).where(table.c.id == "ban").values(document=stored))
    assert {region for region in (None, "DE", "DE-BY", "FR") if not allowed(store, region)} == reached


def test_a_list_that_drops_a_region_stops_no_server(store, monkeypatch):
    put(store, ACME, Agreement.model_validate({**TERMS, "regions": ["DE-BY"]}))
    assert allowed(store, "DE-BY")
    monkeypatch.setattr(vocabulary, "_SUBDIVISIONS", vocabulary._SUBDIVISIONS - {"DE-BY"})
    assert store.confirm(None).policy_version == store.version()
    assert not allowed(store, "FR")


def test_what_is_stored_can_be_exported_applied_and_changed(aged):
    content = json.loads(json.dumps(gitops.export(aged)))
    assert gitops.apply(aged, gitops.parse_file(content, stored=True), **ADMIN) == []
    update_project(aged, "acme", {"mode": "deny_list"}, **ADMIN)
    assert gitops.export(aged)["tenants"][0]["mode"] == "deny_list"


def test_what_is_stored_can_be_taken_away_and_brought_back(aged):
    with_all, before = aged.version(), gitops.export(aged)
    terminate_agreement(aged, "a", **ADMIN)
    assert aged.snapshot().agreements == {}
    roll_back(aged, with_all, confirm=aged.version(), **ADMIN)
    again = gitops.export(aged)
    assert again["agreements"] == [{**before["agreements"][0], "version": 2}]
    archive_project(aged, "acme", **ADMIN)
    assert aged.snapshot().tenants["acme"].archived
    gitops.apply(aged, gitops.parse_file({"format": "flexgate-policy/v1"}), prune=True, **ADMIN)
    assert aged.snapshot().agreements == {}


NEW = {
    "currency": (
        {
            "agreements": [
                {**TERMS, "version": 2, "duties": [{**PAID, "currency": "EUX"}]},
            ]
        },
        "agreement 'a': 'EUX' is not a currency",
    ),
    "region of a tenant": (
        {"tenants": [{"id": "acme", "name": "Acme", "regions": ["FR-ZZ"]}]},
        "project 'acme': 'FR-ZZ'",
    ),
    "name": (
        {"tenants": [{"id": "acme", "name": "A\nB"}]},
        "project 'acme': 'name' must not contain control",
    ),
    "region": ({"agreements": [{**TERMS, "version": 2, "regions": ["FR-ZZ"]}]}, "agreement 'a': 'FR-ZZ'"),
    "license": ({"agreements": [{**TERMS, "version": 2, "license_expression": "Mine"}]}, "agreement 'a': 'Mine'"),
    "duties": (
        {"agreements": [{**TERMS, "version": 2, "duties": [{"kind": "attribute", "credit": "A"}] * 2}]},
        "agreement 'a': 'duties' has 'attribute' twice",
    ),
    "in another agreement": ({"agreements": [{**TERMS, **OLD_TERMS, "id": "b"}]}, "agreement 'b': 'DE-ZZ'"),
}


@pytest.mark.parametrize("new", NEW)
def test_a_word_that_is_new_must_be_in_todays_lists(aged, new):
    content, message = NEW[new]
    with pytest.raises(ChangeRefused, match=message):
        gitops.apply(aged, gitops.parse_file({"format": "flexgate-policy/v1", **content}, stored=True), **ADMIN)
    with pytest.raises(ChangeRefused):
        gitops.parse_file({"format": "flexgate-policy/v1", **content})


def test_no_door_writes_a_word_that_is_unknown(aged):
    with pytest.raises(ChangeRefused, match="project 'acme': 'FR-ZZ'"):
        update_project(aged, "acme", {"regions": ["FR-ZZ"]}, **ADMIN)
    with pytest.raises(ChangeRefused, match="'DE-ZZ' is not a region"):
        revise_agreement(aged, "a", {**TERMS, "regions": ["DE-ZZ"]}, **ADMIN)
