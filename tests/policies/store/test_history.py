"""Revisions can be listed, read, compared and gone back to; what must stay, stays."""

from __future__ import annotations

import sqlite3

import pytest

from flexgate.policies.agreements import Agreement
from flexgate.policies.decide import decide
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.documents import Expert, ExpertSet, Role, Tenant
from flexgate.policies.errors import ChangeRefused, ConfirmationRequired, StoreRolledBack
from flexgate.policies.store import Store, gitops
from flexgate.policies.store.history import diff, newest_revisions, roll_back
from flexgate.policies.store.projects import list_projects

ACME = Tenant(id="acme", name="Acme", mode="deny_list")
NEWS = Agreement(id="a1", owner="wire", experts=frozenset({"news"}), assignee="everyone", effect="permit")
REQUEST = DecisionRequest(decision_id="d")


def _do(store, at, *steps):
    with store.change(actor=f"actor-{at}", note=f"note-{at}", at=at) as change:
        for name, *arguments in steps:
            getattr(change, name)(*arguments)
    return change.policy_version


def _allowed(snapshot):
    return decide(snapshot, "acme", REQUEST, 100.0).allowed


@pytest.fixture
def history(store):
    """Version 2: tenant. 3: news permitted. 4: news prohibited. 5: terminated. 6: renamed."""
    _do(store, 2.0, ("put", ACME))
    _do(store, 3.0, ("put", NEWS))
    _do(store, 4.0, ("put", NEWS.model_copy(update={"effect": "prohibit", "version": 2})))
    _do(store, 5.0, ("remove", Agreement, "a1"))
    _do(store, 6.0, ("put", ACME.model_copy(update={"name": "Acme 2"})))
    return store


def test_revisions_are_numbered_and_attributed(history):
    listed = newest_revisions(history)
    assert [r.version for r in listed] == [6, 5, 4, 3, 2, 1]
    assert (listed[3].actor, listed[3].note, listed[3].at) == ("actor-3.0", "note-3.0", 3.0)
    assert [r.version for r in newest_revisions(history, before=5, limit=2)] == [4, 3]


def test_old_versions_can_be_read(history):
    was = {version: gitops.export(history, version) for version in range(1, 7)}
    assert {version: [a["effect"] for a in file["agreements"]] for version, file in was.items()} == {
        1: [],
        2: [],
        3: ["permit"],
        4: ["prohibit"],
        5: [],
        6: [],
    }
    names = [[tenant["name"] for tenant in was[version]["tenants"]] for version in (1, 5, 6)]
    assert names == [[], ["Acme"], ["Acme 2"]]
    assert was[6] == gitops.export(history)


def test_diff_is_net_and_turns_round(history):
    assert diff(history, 2, 5) == []
    (forth,) = diff(history, 3, 5)
    (back,) = diff(history, 5, 3)
    assert (forth.kind, forth.object_id, forth.after) == ("agreement", "a1", None)
    assert (back.before, back.after) == (forth.after, forth.before)
    assert [c.object_id for c in diff(history, 1, 6)] == ["acme"]


def test_rolling_back_is_a_new_revision_with_the_old_meaning(history):
    assert roll_back(history, 3, confirm=history.version(), actor="admin", at=9.0) == 7
    snapshot = history.snapshot()
    assert _allowed(snapshot) == ("public", "news")
    assert snapshot.tenants["acme"].name == "Acme"
    assert newest_revisions(history)[0].note == "roll back to 3"
    (agreement,) = snapshot.agreements["everyone"].unlimited["news"]
    assert agreement.version == 3


def test_rolling_back_to_the_present_changes_nothing(history):
    assert roll_back(history, 6, confirm=history.version(), actor="admin", at=9.0) == 6


def test_rolling_back_archives_tenants_and_removes_what_came_later(history):
    two = ExpertSet(id="set:two", experts=frozenset({"code", "legal"}))
    terms = NEWS.model_copy(update={"id": "later", "owner": "forge", "experts": frozenset({"set:two"})})
    _do(history, 7.0, ("put", two), ("put", Tenant(id="new", name="N")), ("put", terms))
    roll_back(history, 6, confirm=history.version(), actor="admin", at=9.0)
    snapshot = history.snapshot()
    assert snapshot.tenants["new"].archived
    assert "set:two" not in snapshot.sets
    assert not snapshot.agreements


def test_rolling_back_revives_no_key_and_no_expert(history):
    with history.change(actor="t", at=7.0) as change:
        key = change.mint_key(Role.TENANT, tenant_id="acme").record
    _do(history, 8.0, ("revoke_key", key.key_id))
    _do(history, 9.0, ("put", Expert(id="news", owner="wire", live=False, visibility="hidden")))
    _do(history, 10.0, ("put", Expert(id="extra", owner="wire")))
    roll_back(history, 7, confirm=history.version(), actor="admin", at=11.0)
    snapshot = history.snapshot()
    assert snapshot.keys[key.sha256].revoked == 8.0
    assert not snapshot.experts["news"].live
    assert snapshot.experts["news"].visibility == "listed"
    assert "extra" in snapshot.experts


def test_a_rollback_that_is_not_confirmed_changes_nothing_and_says_what_it_would(history):
    two = ExpertSet(id="set:two", experts=frozenset({"code"}))
    _do(history, 7.0, ("put", two), ("put", Tenant(id="new", name="N")))
    before = history.snapshot()
    for confirm in (None, 0, 6, 8):
        with pytest.raises(ConfirmationRequired) as refused:
            roll_back(history, 0, confirm=confirm, actor="admin", at=9.0)
        assert str(refused.value) == (
            "rolling back from policy version 7 to 0 would archive 2 tenants ('acme', 'new'), remove 1 expert set "
            "('set:two'): nothing was changed; to do it, set 'confirm' to 7, the current version"
        )
    assert history.snapshot() == before


def test_a_rollback_brings_back_no_archived_tenant(history):
    (tenant,) = list_projects(history)
    _do(history, 7.0, ("put", tenant.model_copy(update={"archived": True})))
    roll_back(history, 6, confirm=7, actor="admin", at=9.0)
    assert history.snapshot().tenants["acme"].archived


@pytest.mark.parametrize("version", [-1, 7])
def test_version_that_never_was_is_refused(history, version):
    for call in (
        lambda: diff(history, 1, version),
        lambda: diff(history, version, 1),
        lambda: gitops.export(history, version),
        lambda: roll_back(history, version, confirm=history.version(), actor="a", at=9.0),
    ):
        with pytest.raises(ChangeRefused):
            call()
    assert history.version() == 6


def test_an_agreements_version_is_never_used_for_other_terms_even_once_terminated(history):
    with pytest.raises(ChangeRefused):
        _do(history, 7.0, ("put", NEWS.model_copy(update={"version": 2})))
    _do(history, 7.0, ("put", NEWS.model_copy(update={"version": 3})))


def test_confirm_returns_the_same_snapshot_until_something_changes(store):
    first = store.confirm(None)
    assert store.confirm(first) is first
    _do(store, 2.0, ("put", ACME))
    assert store.confirm(first).policy_version == 2


def test_yesterdays_file_is_refused(store, sqlite_file, tmp_path):
    with sqlite3.connect(f"{tmp_path}/yesterday.db") as copy:
        sqlite3.connect(sqlite_file).backup(copy)
    known_version = _do(store, 2.0, ("put", ACME))
    known = store.confirm(None)
    assert known.policy_version == known_version
    yesterday = Store.open(f"sqlite:///{tmp_path}/yesterday.db")
    with pytest.raises(StoreRolledBack, match="version 1, after version 2 was served"):
        yesterday.confirm(known)
    yesterday.close()


def test_yesterdays_file_is_refused_also_once_it_was_changed_again(store, sqlite_file, tmp_path):
    with sqlite3.connect(f"{tmp_path}/yesterday.db") as copy:
        sqlite3.connect(sqlite_file).backup(copy)
    _do(store, 2.0, ("put", ACME))
    known = store.confirm(None)
    yesterday = Store.open(f"sqlite:///{tmp_path}/yesterday.db")
    _do(yesterday, 3.0, ("put", ACME))
    with pytest.raises(StoreRolledBack, match="another policy version 2"):
        yesterday.confirm(known)
    _do(yesterday, 4.0, ("put", ACME.model_copy(update={"name": "Other"})))
    with pytest.raises(StoreRolledBack, match="another policy version 2"):
        yesterday.confirm(known)
    yesterday.close()


SAFETY = {"listed": {}, "hidden": {"visibility": "hidden"}, "required": {"required": True}}


@pytest.mark.parametrize("now", SAFETY)
@pytest.mark.parametrize("then", SAFETY)
def test_a_rollback_brings_back_what_is_hidden_and_what_is_required(store, then, now):
    code = store.snapshot().experts["code"]
    _do(store, 2.0, ("put", code.model_copy(update={"domain": "first"})))
    version = _do(store, 3.0, ("put", code.model_copy(update=SAFETY[then])))
    _do(store, 4.0, ("put", code.model_copy(update={**SAFETY[now], "domain": "second"})))
    roll_back(store, version, confirm=store.version(), actor="admin", at=9.0)
    assert store.snapshot().experts["code"] == code.model_copy(update={**SAFETY[then], "domain": "second"})


@pytest.mark.parametrize("by", ["agreement", "catalogue"])
def test_a_rollback_that_takes_a_right_away_waits_for_no_required_expert(store, by):
    """A mistaken permission would stay in force because of a unit that was revoked meanwhile."""
    news = store.snapshot().experts["news"]
    must = Agreement(id="must", owner="wire", experts=frozenset({"news"}), assignee="everyone", effect="require")
    required = must if by == "agreement" else news.model_copy(update={"required": True})
    then = _do(store, 2.0, ("put", required))
    _do(store, 3.0, ("remove", Agreement, "must") if by == "agreement" else ("put", news))
    _do(store, 4.0, ("put", news.model_copy(update={"live": False})))
    _do(store, 5.0, ("put", NEWS))
    roll_back(store, then, confirm=store.version(), actor="admin", at=9.0)
    now = {a["id"]: a["effect"] for a in gitops.export(store)["agreements"]}
    assert now == ({"must": "require"} if by == "agreement" else {})
    assert store.snapshot().experts["news"].required == (by == "catalogue")
    assert not store.snapshot().experts["news"].live
