"""The catalogue follows the checkpoint, and gives nobody anything by that."""

from __future__ import annotations

import pytest
from catalogue import sync_catalogue

from flexgate.policies.agreements import Agreement
from flexgate.policies.decide import decide
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.documents import Expert, Tenant
from flexgate.policies.errors import ChangeRefused
from flexgate.policies.store.catalogue import ManifestExpert, put_catalogue

PUBLIC = ManifestExpert("public", "commons", "general")
NEWS = ManifestExpert("news", "wire", "press")


def test_first_start_fills_an_empty_store(empty):
    sync_catalogue(empty, [PUBLIC, NEWS], at=1.0)
    assert list(empty.snapshot().experts) == ["public", "news"]


def test_second_start_with_the_same_checkpoint_makes_no_revision(empty):
    for at in (1.0, 2.0):
        sync_catalogue(empty, [PUBLIC, NEWS], at=at)
    assert empty.version() == 1


def test_expert_that_the_checkpoint_lacks_is_not_live_until_it_is_back(store):
    sync_catalogue(store, [PUBLIC, NEWS], at=2.0)
    live = {e.id for e in store.snapshot().experts.values() if e.live}
    assert live == {"public", "news"}
    sync_catalogue(store, [PUBLIC, NEWS, ManifestExpert("math", "institute", "")], at=3.0)
    assert store.snapshot().experts["math"].live


def test_hidden_expert_stays_hidden(store):
    with store.change(actor="t", at=2.0) as change:
        change.put(Expert(id="news", owner="wire", visibility="hidden"))
    sync_catalogue(store, [PUBLIC, NEWS], at=3.0)
    assert store.snapshot().experts["news"].visibility == "hidden"


def test_new_expert_is_in_nobodys_gate(store):
    with store.change(actor="t", at=2.0) as change:
        change.put(Tenant(id="acme", name="Acme", mode="deny_list"))
    sync_catalogue(store, [PUBLIC, NEWS, ManifestExpert("medical", "clinic", "")], at=3.0)
    decision = decide(store.snapshot(), "acme", DecisionRequest(decision_id="d"), 5.0)
    assert decision.allowed == ("public",)


def test_expert_does_not_change_owner_under_existing_terms(store):
    terms = Agreement(id="a", owner="wire", experts=frozenset({"news"}), assignee="everyone", effect="permit")
    with store.change(actor="t", at=2.0) as change:
        change.put(terms)
    with pytest.raises(ChangeRefused):
        sync_catalogue(store, [PUBLIC, ManifestExpert("news", "thief", "")], at=3.0)


def test_a_start_that_another_servers_change_overtook_is_refused(empty):
    with empty.change(actor="key_else", at=1.0) as change:
        epoch = change.weights_epoch()
        change.revoke_weights("news", slot=1, detail={})
    said = "experts were changed while this server started: start it again"
    with pytest.raises(ChangeRefused, match=said), empty.change(actor="start", at=2.0) as change:
        put_catalogue(change, [PUBLIC, NEWS], epoch=epoch)
    assert empty.version() == 0


def test_an_expert_that_loses_its_owner_is_refused_while_an_agreement_names_it(store):
    """The permission would end, and every project's list would open the expert instead."""
    with store.change(actor="a", at=8.0) as change:
        terms = {"id": "g", "owner": "wire", "experts": ["news"], "assignee": "everyone", "effect": "permit"}
        change.put(Agreement.model_validate(terms))
    said = "agreement 'g' names 'news' with its present owner: change that first"
    with pytest.raises(ChangeRefused, match=said), store.change(actor="start", at=9.0) as change:
        put_catalogue(change, [PUBLIC, NEWS._replace(owner=None)], epoch=1)
    assert store.snapshot().experts["news"].owner == "wire"


def test_the_grade_is_what_the_checkpoint_says_now(store):
    """A new one that says less must not keep the old one's promise."""
    for grade in ("removed", "shared", "unknown"):
        with store.change(actor="start", at=9.0) as change:
            put_catalogue(change, [PUBLIC, NEWS._replace(grade=grade)], epoch=1)
        assert store.snapshot().experts["news"].grade == grade


def test_what_is_not_served_has_the_grade_that_the_checkpoint_states(store):
    """Shared weights may have learnt from it; only a statement says that nothing is left."""
    for grade in ("shared", "removed", "router"):
        with store.change(actor="start", at=9.0) as change:
            put_catalogue(change, [PUBLIC], epoch=1, held={"news": grade})
        assert store.snapshot().experts["news"].grade == grade


def test_what_the_checkpoint_no_longer_names_keeps_its_grade(store):
    """A checkpoint can have lost an expert, or its name, and have kept what shared weights learnt from it."""
    with store.change(actor="start", at=9.0) as change:
        put_catalogue(change, [PUBLIC, NEWS._replace(grade="shared")], epoch=1)
    for held in (None, {"press": "removed"}):
        with store.change(actor="start", at=9.0) as change:
            put_catalogue(change, [PUBLIC], epoch=1, held=held)
        assert store.snapshot().experts["news"].grade == "shared"


def test_no_package_has_a_better_grade_than_the_checkpoint_states(store):
    """It replaces the unit, and not what shared weights have learnt from it."""
    for package, grade in (("removed", "shared"), ("unknown", "unknown")):
        with store.change(actor="start", at=9.0) as change:
            put_catalogue(change, [PUBLIC, NEWS._replace(grade=package)], epoch=1, held={"news": "shared"})
        assert store.snapshot().experts["news"].grade == grade


def test_a_required_expert_stays_required_also_when_it_is_gone(store):
    safe = ManifestExpert("safe", "lab", "safety", required=True)
    for manifest in ([PUBLIC, safe], [PUBLIC], [PUBLIC, safe._replace(required=False)]):
        with store.change(actor="start", at=9.0) as change:
            put_catalogue(change, manifest, epoch=1)
        snapshot = store.snapshot()
        assert snapshot.required == {"public", "safe"}
        assert snapshot.experts["safe"].live == (len(manifest) == 2)
