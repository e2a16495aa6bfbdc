"""A changed set changes what names it: checked like a change of that, and as visible."""

from __future__ import annotations

import pytest

from flexgate.policies.agreements import Agreement
from flexgate.policies.errors import ChangeRefused
from flexgate.policies.store import agreements, checks, gitops, history, sets

ADMIN = {"actor": "admin", "at": 2.0}
MUST = Agreement(id="must", owner="forge", experts=frozenset({"set:s"}), assignee="everyone", effect="require")


@pytest.fixture
def named(store):
    """`set:s`, which a requirement names, with `code` in it."""
    sets.create_set(store, "set:s", ["code"], **ADMIN)
    agreements.put_agreement(store, MUST, **ADMIN)
    return store


def _required(store):
    return {id_ for of_one in store.snapshot().agreements.values() for id_ in of_one.required}


def _unload(store, id_):
    with store.change(actor="a", at=3.0) as change:
        change.put(store.snapshot().experts[id_].model_copy(update={"live": False}))


def test_a_set_brings_nothing_that_is_not_loaded_into_a_requirement(named):
    _unload(named, "legal")
    with pytest.raises(ChangeRefused, match="agreement 'must' requires 'legal', which is not loaded"):
        sets.change_set(named, "set:s", ["code", "legal"], **ADMIN)
    assert sets.get_set(named, "set:s").experts == {"code"}


def test_a_set_whose_requirement_lost_an_expert_can_still_be_changed(named):
    _unload(named, "code")
    sets.change_set(named, "set:s", ["code", "legal"], **ADMIN)
    assert _required(named) == {"code", "legal"}


def test_a_set_takes_no_expert_of_another_owner_into_an_agreement(named):
    """It would permit, prohibit and require nothing, and say so nowhere."""
    with pytest.raises(ChangeRefused, match="agreement 'must' of owner 'forge' names 'set:s', which belongs to 'wire'"):
        sets.change_set(named, "set:s", ["news"], **ADMIN)
    assert _required(named) == {"code"}


def test_a_changed_set_gives_agreements_that_name_it_their_next_version(named):
    """Owners, the audit log and usage tell what an agreement meant by its version."""
    sets.change_set(named, "set:s", ["legal"], actor="admin", at=7.0)
    assert agreements.get_agreement(named, "must") == MUST.model_copy(update={"version": 2})
    seen = agreements.changes_between(named, "forge", 7.0, 8.0)
    assert [(change.before.version, change.after.version) for change in seen] == [(1, 2)]
    version = named.version()
    sets.change_set(named, "set:s", ["legal"], actor="admin", at=8.0)
    assert named.version() == version


def test_a_file_is_applied_again_after_its_set_changed(named):
    first = gitops.export(named)
    sets.change_set(named, "set:s", ["legal"], **ADMIN)
    file = gitops.parse_file(first)
    planned = gitops.plan(named, file).changes
    assert gitops.apply(named, file, **ADMIN) == planned
    assert [(change.kind, change.object_id) for change in planned] == [("expert_set", "set:s"), ("agreement", "must")]
    assert agreements.get_agreement(named, "must").version == 3
    assert gitops.apply(named, file, **ADMIN) == []


def test_a_rollback_of_a_set_gives_its_agreements_a_new_version(named):
    before = named.version()
    sets.change_set(named, "set:s", ["legal"], **ADMIN)
    history.roll_back(named, before, confirm=named.version(), **ADMIN)
    assert _required(named) == {"code"}
    assert agreements.get_agreement(named, "must").version == 3


def test_there_are_so_many_sets_and_each_can_be_changed(named, monkeypatch):
    monkeypatch.setattr(checks, "MOST_SETS", len(sets.list_sets(named)))
    with pytest.raises(ChangeRefused, match=r"^there are [0-9]+ sets already: delete one$"):
        sets.create_set(named, "set:one-more", ["legal"], **ADMIN)
    sets.change_set(named, "set:s", ["legal"], **ADMIN)
