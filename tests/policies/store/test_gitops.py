"""A file makes a policy, twice makes no difference, and a plan is exactly what applying does."""

from __future__ import annotations

import json

import pytest

from flexgate.policies.errors import ChangeRefused
from flexgate.policies.store.gitops import PolicyFile, apply, export, parse_file, plan

CONTENT = {
    "format": "flexgate-policy/v1",
    "required_experts": [],
    "hidden_experts": ["legal"],
    "expert_sets": [{"id": "set:forge", "experts": ["code", "legal"]}],
    "tenants": [
        {"id": "acme", "name": "Acme", "expert_ids": ["news", "set:forge"]},
        {"id": "beta", "name": "Beta", "mode": "deny_list"},
    ],
    "agreements": [
        {
            "id": "forge-all",
            "owner": "forge",
            "experts": ["set:forge"],
            "assignee": "everyone",
            "effect": "permit",
            "not_after": "2030-01-01T00:00:00Z",
        }
    ],
}
FILE = parse_file(CONTENT)
ADMIN = {"actor": "ci", "at": 5.0}


def test_applied_file_is_exported_again(store):
    apply(store, FILE, **ADMIN)
    exported = export(store)
    assert exported == CONTENT
    assert parse_file(json.loads(json.dumps(exported))) == FILE


def test_applying_twice_makes_no_second_revision(store):
    assert len(apply(store, FILE, **ADMIN)) == 5
    version = store.version()
    assert apply(store, FILE, **ADMIN) == []
    assert store.version() == version


def test_plan_is_what_apply_does_and_keeps_nothing(store):
    version, head = store.version(), store.audit_heads()
    planned = plan(store, FILE)
    assert (store.version(), store.audit_heads()) == (version, head)
    assert "acme" in planned.proposed.tenants
    assert apply(store, FILE, **ADMIN) == planned.changes
    assert plan(store, FILE).changes == []


def test_what_the_file_does_not_name_is_left_alone_unless_pruned(store):
    apply(store, FILE, **ADMIN)
    smaller = parse_file({"format": "flexgate-policy/v1", "tenants": CONTENT["tenants"][1:]})
    assert plan(store, smaller).changes == []
    apply(store, smaller, prune=True, **ADMIN)
    snapshot = store.snapshot()
    assert snapshot.tenants["acme"].archived
    assert not snapshot.tenants["beta"].archived
    assert not snapshot.agreements
    assert not snapshot.sets


BAD = [
    ({}, "format"),
    ({"format": "v0"}, "format"),
    ({"rules": []}, "rules"),
    ({"tenants": [{"id": "acme"}]}, r"'tenants\[0\].name' is required"),
    ({"tenants": [{"id": "a", "name": "A", "mode": "all"}]}, r"'tenants\[0\].mode'"),
    ({"agreements": [{**CONTENT["agreements"][0], "purposes": ["fun"]}]}, r"'agreements\[0\].purposes\[0\]'"),
    ({"tenants": [CONTENT["tenants"][0]] * 2}, "'tenants': .*twice"),
]


@pytest.mark.parametrize(("content", "where"), BAD)
def test_mistake_in_a_file_is_named(content, where):
    with_format = content if "format" in content or not content else {**CONTENT, **content}
    with pytest.raises(ChangeRefused, match=where):
        parse_file(with_format)


def test_file_that_does_not_fit_the_store_changes_nothing(store):
    unknown = {**CONTENT["tenants"][0], "expert_ids": ["nonsense"]}
    for bad in ({"tenants": [unknown]}, {"hidden_experts": ["nonsense"]}):
        version = store.version()
        with pytest.raises(ChangeRefused, match="nonsense"):
            apply(store, parse_file({**CONTENT, **bad}), **ADMIN)
        assert store.version() == version


def test_schema_is_closed():
    schema = PolicyFile.model_json_schema()
    closed = [schema, *schema["$defs"].values()]
    assert all(part.get("additionalProperties") is False for part in closed)


@pytest.mark.parametrize(("first", "second"), [("hidden", "required"), ("required", "hidden")])
def test_one_file_hides_an_expert_that_was_required_and_the_other_way_round(store, first, second):
    for field, other in ((first, second), (second, first)):
        lists = {f"{field}_experts": ["legal"], f"{other}_experts": []}
        apply(store, parse_file({"format": "flexgate-policy/v1", **lists}), **ADMIN)
        exported = export(store)
        assert {name: exported[name] for name in lists} == lists
