"""Agreements, explanations, simulations and the policy's history, through HTTP."""

from __future__ import annotations

from typing import Any

import pytest

from flexgate.policies.errors import StoreUnavailable
from flexgate.policies.store import Store

pytestmark = pytest.mark.asyncio

PERMISSIONS = "/v1/organization/projects/t/expert_permissions"


def allowed(explanation: dict[str, Any]) -> list[str]:
    return [expert["expert"] for expert in explanation["experts"] if expert["allowed"]]


async def test_permissions_and_agreements_decide_together(call: Any) -> None:
    explain = "/v1/policy/explain?project_id=t"
    assert allowed((await call("sk-admin", "GET", explain)).json()) == ["public", "news"]
    body = {"mode": "deny_list", "expert_ids": ["news"]}
    set_ = await call("sk-admin", "POST", PERMISSIONS, json=body)
    assert set_.json() == {"object": "project.expert_permissions", **body}
    after = await call("sk-admin", "GET", explain)
    assert allowed(after.json()) == ["public", "math"]
    assert set_.headers["x-flexgate-policy-version"] == str(after.json()["policy_version"])
    assert (await call("sk-admin", "DELETE", PERMISSIONS)).json()["deleted"] is True
    assert allowed((await call("sk-admin", "GET", explain)).json()) == ["public"]


async def test_permissions_that_were_changed_meanwhile_are_not_replaced(call: Any) -> None:
    read = (await call("sk-admin", "GET", PERMISSIONS)).json()
    before = {field: read[field] for field in ("mode", "expert_ids")}
    changed = {"mode": "allow_list", "expert_ids": []}
    assert (await call("sk-admin", "POST", PERMISSIONS, json={**changed, "before": before})).status_code == 200
    refused = await call("sk-admin", "POST", PERMISSIONS, json={**before, "before": before})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith("Project 't' was changed meanwhile: read it again")
    assert (await call("sk-admin", "GET", PERMISSIONS)).json()["expert_ids"] == []


async def test_agreements_get_ids_and_versions(call: Any) -> None:
    terms = {"experts": ["math"], "assignee": "tenant:t", "effect": "permit", "owner": "academy"}
    made = (await call("sk-admin", "POST", "/v1/agreements", json=terms)).json()
    assert made["id"].startswith("agr_")
    assert (made["object"], made["version"], made["not_after"]) == ("agreement", 1, None)
    path = f"/v1/agreements/{made['id']}"
    revised = {**terms, "not_after": "2099-01-01T00:00:00Z"}
    assert (await call("sk-admin", "POST", path, json=revised)).json()["version"] == 2
    assert (await call("sk-admin", "POST", path, json=revised)).json()["version"] == 2
    stale = await call("sk-admin", "POST", path, json={**terms, "version": 2})
    assert stale.status_code == 400
    assert (await call("sk-admin", "GET", path)).json()["not_after"] == "2099-01-01T00:00:00Z"
    assert (await call("sk-admin", "DELETE", path)).json()["deleted"] is True
    assert (await call("sk-admin", "GET", path)).status_code == 404


async def test_a_simulation_says_who_gains_and_who_loses_and_changes_nothing(call: Any, real_store: Store) -> None:
    await call("sk-t", "POST", "/v1/completions", json={"prompt": "x", "flexgate": {"experts": {"only": ["news"]}}})
    version, head = real_store.version(), real_store.audit_heads()
    proposal = {
        "format": "flexgate-policy/v1",
        "tenants": [{"id": "t", "name": "t", "expert_ids": ["math"]}],
    }
    answer = (await call("sk-admin", "POST", "/v1/policy/simulate", json={"policy": proposal})).json()
    assert answer["policy_version"] == real_store.version() == version
    assert real_store.audit_heads() == head
    found = {tuple(d["only"] or ()): d for d in answer["differences"]}
    assert (found[()]["project_id"], found[()]["gained"], found[()]["lost"]) == ("t", ["math"], ["news"])
    assert (found[("news",)]["requests"], found[("news",)]["refused_after"]) == (1, "ExpertDenied")
    assert answer["replayed"] == 3
    assert [(change["kind"], change["id"]) for change in answer["changes"]] == [("tenant", "t")]


async def test_revisions_are_listed_compared_and_rolled_back(call: Any, real_store: Store) -> None:
    before = real_store.version()
    await call("sk-admin", "POST", PERMISSIONS, json={"mode": "allow_list", "expert_ids": ["math"]})
    listed = (await call("sk-auditor", "GET", "/v1/policy/revisions?limit=1")).json()
    assert (listed["data"][0]["version"], listed["has_more"]) == (before + 1, True)
    assert listed["data"][0]["actor"] in {key.key_id for key in real_store.keys()}
    older = (await call("sk-auditor", "GET", f"/v1/policy/revisions?after={before + 1}")).json()
    assert [revision["version"] for revision in older["data"]] == [2, 1]
    diff = (await call("sk-auditor", "GET", f"/v1/policy/diff?old={before}&new={before + 1}")).json()
    assert diff["changes"][0]["after"]["expert_ids"] == ["math"]
    refused = await call("sk-admin", "POST", "/v1/policy/rollback", json={"version": before})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "confirmation_required")
    assert "would change 1 tenant ('t'): nothing was changed" in refused.json()["error"]["message"]
    body = {"version": before, "confirm": before + 1}
    back = await call("sk-admin", "POST", "/v1/policy/rollback", json=body)
    assert back.json()["policy_version"] == before + 2
    assert (await call("sk-admin", "GET", PERMISSIONS)).json()["expert_ids"] == ["news", "secret"]


async def test_a_change_that_cannot_be_audited_fails(call: Any, real_store: Store, monkeypatch: Any) -> None:
    def full(*_: object) -> None:
        raise StoreUnavailable("disk full")

    version = real_store.version()
    monkeypatch.setattr("flexgate.policies.store.audit.append", full)
    answer = await call("sk-admin", "POST", PERMISSIONS, json={"mode": "deny_list", "expert_ids": []})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "policy_unavailable")
    monkeypatch.undo()
    assert real_store.version() == version
    assert (await call("sk-admin", "GET", PERMISSIONS)).json()["mode"] == "allow_list"


async def test_project_fields_of_our_own(call: Any) -> None:
    path = "/v1/organization/projects/t"
    own = {"purposes": ["search"], "regions": ["DE"], "listed": ["secret"], "groups": ["press"]}
    changed = (await call("sk-admin", "POST", path, json={"flexgate": own})).json()
    assert own.items() <= changed["flexgate"].items()
    assert changed["name"] == "t"
    assert "listed" not in (await call("sk-t", "GET", path)).json()["flexgate"]
    explained = await call("sk-t", "GET", "/v1/policy/explain?purpose=search&region=DE")
    assert allowed(explained.json()) == ["public", "news", "secret"]
