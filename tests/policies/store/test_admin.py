"""Projects, service accounts, admin keys and agreements, as administrators and owners use them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from sqlalchemy import update

from flexgate.policies.agreements import Agreement
from flexgate.policies.decide import decide
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.documents import Role
from flexgate.policies.errors import ChangeRefused, ObjectUnknown
from flexgate.policies.store import accounts, agreements, checks, projects, schema, sets
from flexgate.policies.store.database import writing
from flexgate.server.http.auth import KeyRevoked, KeyWrong, WrongRole, authenticate, require_tenant

ADMIN = {"actor": "admin", "at": 2.0}
NEWS = Agreement(id="a1", owner="wire", experts=frozenset({"news"}), assignee="everyone", effect="permit")


@pytest.fixture
def project(store):
    return projects.create_project(store, "Acme", **ADMIN)


def _allowed(store, secret):
    snapshot = store.snapshot()
    tenant = require_tenant(authenticate(snapshot, f"Bearer {secret}", 5.0))
    return decide(snapshot, tenant, DecisionRequest(decision_id="d"), 5.0).allowed


def test_a_whole_tenant_life(store):
    project = projects.create_project(store, "Acme", **ADMIN)
    account, minted = accounts.create_service_account(store, project.id, "robot", **ADMIN)
    assert _allowed(store, minted.secret) == ("public",)
    agreements.put_agreement(store, NEWS, **ADMIN)
    assert _allowed(store, minted.secret) == ("public",)
    permissions = {"mode": "allow_list", "expert_ids": ["news"]}
    projects.update_project(store, project.id, permissions, **ADMIN)
    assert _allowed(store, minted.secret) == ("public", "news")
    agreements.terminate_agreement(store, "a1", owner_id="wire", actor="wire", at=3.0)
    assert _allowed(store, minted.secret) == ("public",)
    accounts.delete_service_account(store, project.id, account.id, actor="admin", at=4.0)
    with pytest.raises(KeyRevoked):
        _allowed(store, minted.secret)
    projects.archive_project(store, project.id, **ADMIN)
    assert projects.list_projects(store) == []
    assert projects.get_project(store, project.id).archived


def test_no_other_projects_rows_are_read_for_one_project(store, project):
    """Rows that could not be read show what is."""
    account, minted = accounts.create_service_account(store, project.id, "robot", **ADMIN)
    spare, _ = accounts.create_service_account(store, project.id, "spare", actor="admin", at=3.0)
    other = projects.create_project(store, "Other", **ADMIN)
    _, foreign = accounts.create_service_account(store, other.id, "robot", **ADMIN)
    with writing(store.engine) as connection:
        damage = update(schema.tenants).where(schema.tenants.c.id == other.id).values(document={})
        connection.execute(damage)
        connection.execute(
            update(schema.api_keys).where(schema.api_keys.c.id == foreign.record.key_id).values(role="?")
        )
    assert projects.get_project(store, project.id) == project
    assert accounts.list_service_accounts(store, project.id) == [account, spare]
    key_id = minted.record.key_id
    projects.set_quota(store, project.id, {"requests_per_minute": 5}, key_id=key_id, **ADMIN)
    assert accounts.revoke_project_key(store, project.id, key_id, **ADMIN).revoked == 2.0
    assert accounts.list_service_accounts(store, project.id) == [spare]
    projects.archive_project(store, project.id, **ADMIN)
    assert accounts.list_service_accounts(store, project.id) == []


def test_new_project_is_empty_allow_list(store, project):
    assert projects.list_projects(store) == [project]
    assert (project.mode, project.expert_ids) == ("allow_list", frozenset())


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": "everything"},
        {"expert_ids": ["nonsense"]},
        {"expert_ids": ["public"]},
        {"admin": True},
        {"id": "other"},
        {"archived": True},
        {"name": ""},
    ],
)
def test_project_field_that_cannot_be_is_refused(store, project, fields):
    with pytest.raises(ChangeRefused):
        projects.update_project(store, project.id, fields, **ADMIN)
    assert projects.get_project(store, project.id) == project


def test_archived_project_cannot_be_used_or_changed(store, project):
    minted = accounts.create_service_account(store, project.id, "robot", **ADMIN)[1]
    for _ in range(2):
        projects.archive_project(store, project.id, **ADMIN)
    with pytest.raises(KeyWrong):
        _allowed(store, minted.secret)
    assert store.keys()[0].revoked == 2.0
    with pytest.raises(ChangeRefused):
        projects.update_project(store, project.id, {"name": "Back"}, **ADMIN)
    with pytest.raises(ChangeRefused):
        accounts.create_service_account(store, project.id, "again", **ADMIN)


def test_unknown_project(store):
    for call in (
        lambda: projects.get_project(store, "x"),
        lambda: projects.update_project(store, "x", {}, **ADMIN),
        lambda: projects.archive_project(store, "x", **ADMIN),
        lambda: accounts.create_service_account(store, "x", "robot", **ADMIN),
        lambda: accounts.list_service_accounts(store, "x"),
    ):
        with pytest.raises(ObjectUnknown, match=r"^there is no project 'x'$"):
            call()


def test_two_keys_live_side_by_side_for_rotation(store, project):
    old_account, old = accounts.create_service_account(store, project.id, "old", **ADMIN)
    new = accounts.create_service_account(store, project.id, "new", expires=99.0, **ADMIN)[1]
    assert _allowed(store, old.secret) == _allowed(store, new.secret)
    names = [account.name for account in accounts.list_service_accounts(store, project.id)]
    assert sorted(names) == ["new", "old"]
    accounts.delete_service_account(store, project.id, old_account.id, **ADMIN)
    (left,) = accounts.list_service_accounts(store, project.id)
    assert left.name == "new"
    assert _allowed(store, new.secret) == ("public",)


def test_another_projects_keys_are_as_unknown_as_none(store, project):
    other = projects.create_project(store, "Other", **ADMIN)
    account, minted = accounts.create_service_account(store, other.id, "robot", **ADMIN)
    messages = []
    for key_id in (minted.record.key_id, "key_nonsense"):
        with pytest.raises(ObjectUnknown) as caught:
            accounts.revoke_project_key(store, project.id, key_id, **ADMIN)
        messages.append(str(caught.value).replace(key_id, "ID"))
    for account_id in (account.id, "svc_acct_nonsense"):
        with pytest.raises(ObjectUnknown) as caught:
            accounts.delete_service_account(store, project.id, account_id, **ADMIN)
        messages.append(str(caught.value).replace(account_id, "ID"))
    assert len(set(messages)) == 2
    assert _allowed(store, minted.secret) == ("public",)


def test_admin_keys_of_every_role_cannot_infer(store):
    for role, owner in ((Role.ADMIN, None), (Role.AUDITOR, None), (Role.OWNER, "wire")):
        minted = accounts.create_admin_key(store, "boss", role=role, owner_id=owner, **ADMIN)
        with pytest.raises(WrongRole):
            _allowed(store, minted.secret)
    assert [key.name for key in accounts.list_admin_keys(store)] == ["boss"] * 3
    with pytest.raises(ChangeRefused):
        accounts.create_admin_key(store, "sneaky", role=Role.TENANT, **ADMIN)


def test_last_lasting_admin_key_is_kept(store, project):
    first = accounts.create_admin_key(store, "first", **ADMIN).record
    accounts.create_admin_key(store, "short", expires=9.0, **ADMIN)
    tenant_key = accounts.create_service_account(store, project.id, "robot", **ADMIN)[1].record
    with pytest.raises(ChangeRefused):
        accounts.revoke_admin_key(store, first.key_id, **ADMIN)
    accounts.create_admin_key(store, "second", **ADMIN)
    assert accounts.revoke_admin_key(store, first.key_id, **ADMIN).revoked == 2.0
    for key_id in (tenant_key.key_id, "key_nonsense"):
        with pytest.raises(ObjectUnknown):
            accounts.revoke_admin_key(store, key_id, **ADMIN)


def test_owner_sees_and_changes_its_own_agreements_only(store):
    agreements.put_agreement(store, NEWS, owner_id="wire", actor="wire", at=2.0)
    code = NEWS.model_copy(update={"id": "a2", "owner": "forge", "experts": frozenset({"code"})})
    agreements.put_agreement(store, code, owner_id="forge", actor="forge", at=2.0)
    assert agreements.list_agreements(store, owner_id="wire") == [NEWS]
    assert agreements.list_agreements(store) == [NEWS, code]
    for agreement_id in ("a2", "a9"):
        pattern = rf"^there is no agreement '{agreement_id}'$"
        with pytest.raises(ObjectUnknown, match=pattern):
            agreements.get_agreement(store, agreement_id, owner_id="wire")
        with pytest.raises(ObjectUnknown, match=pattern):
            agreements.terminate_agreement(store, agreement_id, owner_id="wire", **ADMIN)
    with pytest.raises(ChangeRefused):
        agreements.put_agreement(store, code, owner_id="wire", **ADMIN)
    stolen = NEWS.model_copy(update={"id": "a2", "version": 9})
    with pytest.raises(ChangeRefused):
        agreements.put_agreement(store, stolen, owner_id="wire", **ADMIN)
    assert agreements.get_agreement(store, "a2") == code


@pytest.mark.parametrize(("bound", "which"), [("MOST_WITH_ONE", " with this assignee"), ("MOST_OF_OWNER", "")])
def test_an_owner_makes_so_many_agreements_and_may_revise_and_terminate_them(store, monkeypatch, bound, which):
    monkeypatch.setattr(agreements, bound, 2)
    fields = {"experts": ["news"], "assignee": "group:a", "effect": "permit"}
    by_wire = {"actor": "wire", "at": 2.0, "owner_id": "wire"}
    first, _ = (agreements.create_agreement(store, fields, **by_wire) for _ in range(2))
    sentence = f"^an owner may have 2 agreements{which}, and 'wire' has 2: revise or terminate one$"
    with pytest.raises(ChangeRefused, match=sentence):
        agreements.create_agreement(store, fields, **by_wire)
    other = fields | {"assignee": "group:b"}
    if which:
        elsewhere = agreements.create_agreement(store, other, **by_wire)
        with pytest.raises(ChangeRefused, match=sentence):
            agreements.revise_agreement(store, elsewhere.id, fields, **by_wire)
    assert agreements.revise_agreement(store, first.id, fields | {"effect": "prohibit"}, **by_wire).version == 2
    code = {"experts": ["code"], "assignee": "group:a", "effect": "permit", "owner": "forge"}
    agreements.create_agreement(store, code, actor="forge", at=2.0, owner_id="forge")
    agreements.terminate_agreement(store, first.id, **by_wire)
    agreements.create_agreement(store, fields, **by_wire)
    agreements.create_agreement(store, fields | {"owner": "wire"}, **ADMIN)


MUST = NEWS.model_copy(update={"id": "must", "effect": "require"})


def test_so_many_agreements_require_something_of_one_assignee(store, monkeypatch):
    monkeypatch.setattr(checks, "MOST_REQUIREMENTS", 2)
    fields = {"owner": "wire", "experts": ["news"], "effect": "require"}
    first, _ = (agreements.create_agreement(store, fields | {"assignee": "group:a"}, **ADMIN) for _ in range(2))
    sentence = r"^2 agreements require something of 'group:a' already: name several experts, or a set, in one of them$"
    elsewhere = agreements.create_agreement(store, fields | {"assignee": "group:b"}, **ADMIN)
    permits = agreements.create_agreement(store, fields | {"assignee": "group:a", "effect": "permit"}, **ADMIN)
    with pytest.raises(ChangeRefused, match=sentence):
        agreements.create_agreement(store, fields | {"assignee": "group:a"}, **ADMIN)
    for other in (elsewhere, permits):
        with pytest.raises(ChangeRefused, match=sentence):
            agreements.revise_agreement(store, other.id, fields | {"assignee": "group:a"}, **ADMIN)
    until = fields | {"assignee": "group:a", "not_after": "2030-01-01T00:00:00Z"}
    assert agreements.revise_agreement(store, first.id, until, **ADMIN).version == 2
    agreements.terminate_agreement(store, first.id, **ADMIN)
    agreements.create_agreement(store, fields | {"assignee": "group:a"}, **ADMIN)


def test_an_owner_neither_requires_an_expert_nor_ends_what_an_administrator_requires(store):
    """It would sell by force what it is paid for, or take a safety expert out of others' requests."""
    refused = pytest.raises(ChangeRefused, match="what projects' requests must use is said by administrators")
    fields = {"experts": ["news"], "assignee": "everyone", "effect": "require"}
    with refused:
        agreements.create_agreement(store, fields, owner_id="wire", **ADMIN)
    with refused:
        agreements.put_agreement(store, MUST, owner_id="wire", **ADMIN)
    agreements.put_agreement(store, MUST, **ADMIN)
    for effect in ("permit", "require"):
        with refused:
            agreements.revise_agreement(store, "must", {**fields, "effect": effect}, owner_id="wire", **ADMIN)
    with refused:
        agreements.put_agreement(
            store, MUST.model_copy(update={"effect": "permit", "version": 2}), owner_id="wire", **ADMIN
        )
    with refused:
        agreements.terminate_agreement(store, "must", owner_id="wire", **ADMIN)
    assert agreements.list_agreements(store, owner_id="wire") == [MUST]
    agreements.terminate_agreement(store, "must", **ADMIN)


PRICED = {"experts": ["news"], "assignee": "everyone", "effect": "permit", "purposes": ["search", "ai-input"]}


def _rate(rate, **fields):
    return {**PRICED, "duties": [{"kind": "compensate", "rate": rate, "currency": "EUR", "unit": "request"}], **fields}


@pytest.mark.parametrize("by", ["agreement", "set", "catalogue"])
def test_no_owner_raises_the_price_of_what_projects_must_use(store, by):
    """They cannot leave the expert out, so that it could take what it likes."""
    created = agreements.create_agreement(store, _rate("2"), owner_id="wire", **ADMIN)
    if by == "catalogue":
        with store.change(**ADMIN) as change:
            change.put(store.snapshot().experts["news"].model_copy(update={"required": True}))
    else:
        named = "news" if by == "agreement" else "set:s"
        sets.create_set(store, "set:s", ["news"], **ADMIN)
        agreements.put_agreement(store, MUST.model_copy(update={"experts": frozenset({named})}), **ADMIN)
    refused = pytest.raises(ChangeRefused, match="'news' must be used by projects' requests, so administrators agree")
    for fields in (_rate("3"), _rate("2", purposes=["search"]), _rate("2", assignee="group:a")):
        with refused:
            agreements.revise_agreement(store, created.id, fields, owner_id="wire", **ADMIN)
        with refused:
            agreements.create_agreement(store, fields, owner_id="wire", **ADMIN)
    for fields in (_rate("1"), _rate("1", not_after="2030-01-01T00:00:00Z"), PRICED, {**PRICED, "effect": "prohibit"}):
        agreements.revise_agreement(store, created.id, fields, owner_id="wire", **ADMIN)
    agreements.terminate_agreement(store, created.id, owner_id="wire", **ADMIN)
    agreements.create_agreement(store, _rate("3", owner="wire"), **ADMIN)


@pytest.mark.parametrize("ends", [None, "1970-01-01T00:00:09Z"])
def test_what_another_project_must_use_or_what_is_over_binds_no_price(store, project, ends):
    assignee = f"tenant:{project.id}"
    must = {"id": "must", "owner": "wire", "experts": ["news"], "assignee": assignee, "effect": "require"}
    agreements.create_agreement(store, {**must, "not_after": ends}, **ADMIN)
    other = projects.create_project(store, "Other", **ADMIN)
    fields = _rate("3", assignee=f"tenant:{other.id}" if ends is None else assignee)
    agreements.create_agreement(store, fields, owner_id="wire", actor="w", at=9.0)


@pytest.mark.parametrize(
    "further",
    [
        {"assignee": "group:b"},
        {"purposes": None},
        {"purposes": frozenset({"search", "legal"})},
        {"regions": frozenset({"DE", "FR"})},
        {"not_before": None},
        {"not_after": None},
    ],
)
def test_what_is_not_loaded_is_required_of_no_further_request(store, further):
    narrow = {
        "assignee": "group:a",
        "purposes": ["search"],
        "regions": ["DE"],
        "not_before": "2026-01-01T00:00:00Z",
        "not_after": "2027-01-01T00:00:00Z",
    }
    must = Agreement.model_validate({**MUST.model_dump(), **narrow})
    agreements.put_agreement(store, must, **ADMIN)
    with store.change(actor="a", at=3.0) as change:
        change.put(store.snapshot().experts["news"].model_copy(update={"live": False}))
    with pytest.raises(ChangeRefused, match="agreement 'must' requires 'news', which is not loaded"):
        agreements.put_agreement(store, must.model_copy(update={**further, "version": 2}), **ADMIN)
    fewer = {"version": 2, "not_after": datetime(2026, 6, 1, tzinfo=UTC)}
    agreements.put_agreement(store, must.model_copy(update=fewer), **ADMIN)


def test_what_is_not_loaded_cannot_begin_to_be_required(store):
    agreements.put_agreement(store, MUST, **ADMIN)
    news = store.snapshot().experts["news"]
    with store.change(actor="a", at=3.0) as change:
        change.put(news.model_copy(update={"live": False}))
    with store.change(actor="a", at=3.0) as change:
        change.put(MUST.model_copy(update={"version": 2, "purposes": frozenset({"search"})}))
    for document, why in (
        (MUST.model_copy(update={"id": "new"}), "agreement 'new' requires 'news', which is not loaded"),
        (news.model_copy(update={"live": False, "required": True}), "'news' is not loaded: if it were required"),
    ):
        with pytest.raises(ChangeRefused, match=why), store.change(actor="a", at=3.0) as change:
            change.put(document)


def test_changed_terms_need_a_higher_version(store):
    first = agreements.put_agreement(store, NEWS, **ADMIN)
    ban = NEWS.model_copy(update={"effect": "prohibit"})
    with pytest.raises(ChangeRefused):
        agreements.put_agreement(store, ban, **ADMIN)
    version_2 = ban.model_copy(update={"version": 2})
    assert agreements.put_agreement(store, version_2, **ADMIN) == first + 1


def test_versions_of_many_agreements_are_read_in_one_query(store):
    fields = {"experts": ["news"], "assignee": "everyone", "effect": "permit"}
    for id_ in ("a", "b", "c"):
        agreements.create_agreement(store, {**fields, "id": id_, "owner": "wire"}, **ADMIN)
    agreements.revise_agreement(store, "b", {**fields, "purposes": ["search"]}, **ADMIN)
    agreements.terminate_agreement(store, "c", **ADMIN)
    asked = []
    sa.event.listen(store.engine, "before_cursor_execute", lambda *given: asked.append(given[2]))
    found = agreements.read_versions(store, {("a", 1), ("b", 2), ("c", 1), ("c", 2), ("d", 1)})
    assert {name: one.version for name, one in found.items()} == {("a", 1): 1, ("b", 2): 2, ("c", 1): 1}
    assert len([query for query in asked if "policy_changes" in query]) == 1
