"""Who may see what: absent and not the caller's are one answer, and hidden experts are nonsense."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from flexgate.policies.documents import Role
from flexgate.policies.store import Store, accounts
from flexgate.server.admin.operations import OPERATIONS

pytestmark = pytest.mark.asyncio

PROJECT_ROUTES = [o for o in OPERATIONS if "{project_id}" in o.path]
INSIDE_PROJECTS = [o for o in PROJECT_ROUTES if o.path.count("{") == 2]
READABLE = [o for o in PROJECT_ROUTES if Role.TENANT in o.roles]
NEVER = [o for o in OPERATIONS if Role.TENANT not in o.roles]


def same(left: httpx.Response, right: httpx.Response) -> bool:
    """Byte for byte, but for the request's own id."""
    heads = [{k: v for k, v in r.headers.items() if k != "x-request-id"} for r in (left, right)]
    return left.status_code == right.status_code and left.content == right.content and heads[0] == heads[1]


def path_of(operation: Any, project: str, other: str = "x") -> str:
    path = operation.path.replace("{project_id}", project)
    names = "service_account_id key_id rate_limit_id agreement_id receipt_id set_id expert job upload file period"
    for name in names.split():
        path = path.replace(f"{{{name}}}", other)
    return path


@pytest.mark.parametrize("operation", READABLE, ids=lambda o: f"{o.method} {o.path}")
async def test_a_tenant_reads_its_own_project_and_another_is_like_none(call: Any, operation: Any) -> None:
    for key, own, other in (("sk-t", "t", "u"), ("sk-u", "u", "t")):
        assert (await call(key, "GET", path_of(operation, own))).status_code == 200
        theirs = await call(key, "GET", path_of(operation, other))
        absent = await call(key, "GET", path_of(operation, "proj_nonsense"))
        assert theirs.status_code == 404
        assert same(theirs, absent)


async def test_explanations_of_another_project_are_like_those_of_none(call: Any) -> None:
    path = "/v1/policy/explain?project_id="
    assert (await call("sk-t", "GET", path + "t")).json() == (await call("sk-t", "GET", "/v1/policy/explain")).json()
    theirs, absent = await call("sk-t", "GET", path + "u"), await call("sk-t", "GET", path + "nonsense")
    assert theirs.status_code == 404
    assert same(theirs, absent)


@pytest.mark.parametrize("operation", NEVER, ids=lambda o: f"{o.method} {o.path}")
async def test_what_no_tenant_may_do_is_refused_before_anything_is_looked_up(call: Any, operation: Any) -> None:
    answers = [
        await call("sk-t", operation.method, path_of(operation, project, other), json={})
        for project, other in (("t", "a-news"), ("u", "key_x"), ("nonsense", "nonsense"), ("a b", "%00"))
    ]
    assert answers[0].status_code == 403
    assert all(same(answers[0], answer) for answer in answers[1:])


@pytest.mark.parametrize("operation", INSIDE_PROJECTS, ids=lambda o: f"{o.method} {o.path}")
async def test_an_object_of_another_project_is_like_none(call: Any, real_store: Store, operation: Any) -> None:
    account, minted = accounts.create_service_account(real_store, "u", "robot", actor="test", at=2.0)
    key = minted.record.key_id
    real = {"service_account_id": account.id, "key_id": key, "rate_limit_id": f"rl-{key}"}
    name = operation.path.rpartition("{")[2].rstrip("}")
    theirs = await call("sk-admin", operation.method, path_of(operation, "t", real[name]), json={})
    absent = await call("sk-admin", operation.method, path_of(operation, "t", "nonsense"), json={})
    assert theirs.status_code == 404
    assert same(theirs, absent)


async def test_an_owner_sees_and_ends_its_own_agreements_only(call: Any) -> None:
    listed = (await call("sk-owner", "GET", "/v1/agreements")).json()
    assert [agreement["id"] for agreement in listed["data"]] == ["a-news"]
    for method in ("GET", "POST", "DELETE"):
        terms = {"experts": ["news"], "assignee": "everyone", "effect": "permit"}
        body = {"json": terms} if method == "POST" else {}
        theirs = await call("sk-owner", method, "/v1/agreements/a-math", **body)
        absent = await call("sk-owner", method, "/v1/agreements/nonsense", **body)
        assert theirs.status_code == 404
        assert same(theirs, absent)
    ended = await call("sk-owner", "DELETE", "/v1/agreements/a-news")
    assert ended.json() == {"id": "a-news", "object": "agreement.deleted", "deleted": True}
    assert (await call("sk-owner", "GET", "/v1/agreements")).json()["data"] == []
    reasons = (await call("sk-t", "GET", "/v1/policy/explain")).json()["experts"]
    assert {e["expert"]: e["allowed"] for e in reasons} == {"public": True, "news": False, "math": False}


async def test_an_owner_sees_its_own_experts_only(call: Any) -> None:
    listed = (await call("sk-owner", "GET", "/v1/experts")).json()["data"]
    assert [(expert["id"], expert["grade"]) for expert in listed] == [("news", "removed")]
    answers = [await call("sk-owner", "GET", f"/v1/experts/{name}") for name in ("math", "secret", "nonsense")]
    assert answers[0].status_code == 404
    assert same(answers[0], answers[1])
    assert same(answers[0], answers[2])


async def test_a_tenant_reads_what_excluding_an_expert_excludes(call: Any) -> None:
    """Wherever an exclusion is shown: in the list, and where it is explained."""
    expected = {"public": "unknown", "news": "removed", "math": "router"}
    listed = (await call("sk-t", "GET", "/v1/experts")).json()["data"]
    assert {expert["id"]: expert["grade"] for expert in listed} == expected
    explained = (await call("sk-t", "GET", "/v1/policy/explain")).json()["experts"]
    assert {expert["expert"]: expert["grade"] for expert in explained} == expected


async def test_an_owner_cannot_tell_others_experts_from_nonsense(call: Any) -> None:
    answers = []
    for expert in ("math", "secret", "nonsense"):
        body = {"experts": [expert], "assignee": "everyone", "effect": "permit"}
        answer = await call("sk-owner", "POST", "/v1/agreements", json=body)
        answers.append(answer.text.replace(expert, "X"))
    assert answers[0] == answers[1] == answers[2]
    body = {"experts": ["news"], "assignee": "everyone", "effect": "permit", "owner": "academy"}
    assert (await call("sk-owner", "POST", "/v1/agreements", json=body)).status_code == 400


async def test_an_owner_knows_tenants_by_pseudonyms_alone(call: Any) -> None:
    terms = {"experts": ["news"], "assignee": "tenant:t", "effect": "prohibit", "owner": "gazette", "id": "ban"}
    assert (await call("sk-admin", "POST", "/v1/agreements", json=terms)).status_code == 200
    seen = await call("sk-owner", "GET", "/v1/agreements/ban")
    name = seen.json()["assignee"]
    assert name.startswith("tenant:anon-")
    assert "tenant:t" not in seen.text
    del terms["id"], terms["owner"]
    revised = await call("sk-owner", "POST", "/v1/agreements/ban", json={**terms, "assignee": name, "regions": ["DE"]})
    assert (revised.status_code, revised.json()["assignee"]) == (200, name)
    assert (await call("sk-admin", "GET", "/v1/agreements/ban")).json()["assignee"] == "tenant:t"


async def test_an_owner_cannot_tell_a_tenants_id_from_nonsense(call: Any) -> None:
    """Otherwise the pseudonym in the response would say which tenant the owner guessed."""
    answers = []
    for name in ("t", "u", "nonsense", "anon-0123456789abcdef0123"):
        body = {"experts": ["news"], "assignee": f"tenant:{name}", "effect": "permit"}
        for path in ("/v1/agreements", "/v1/agreements/a-news"):
            answer = await call("sk-owner", "POST", path, json=body)
            answers.append((answer.status_code, answer.text.replace(f"'{name}'", "X")))
    assert answers[0][0] == 400
    assert len(set(answers)) == 1, answers


async def test_hidden_experts_show_nowhere_to_a_tenant(call: Any, services: Any) -> None:
    """`secret` is hidden from t, which has it on its allow list all the same, and in its default set."""
    default_experts = {"flexgate": {"default_experts": ["news", "secret"]}}
    changed = await call("sk-admin", "POST", "/v1/organization/projects/t", json=default_experts)
    assert changed.json()["flexgate"]["default_experts"] == ["news", "secret"]
    for path in (
        "/v1/organization/projects/t",
        "/v1/organization/projects/t/expert_permissions",
        "/v1/organization/projects/t/rate_limits",
        "/v1/policy/explain",
        "/v1/experts",
        "/v1/models",
    ):
        answer = await call("sk-t", "GET", path)
        assert answer.status_code == 200
        assert "secret" not in answer.text + str(answer.headers), path
    shown = (await call("sk-t", "GET", "/v1/organization/projects/t")).json()
    assert shown["flexgate"]["default_experts"] == ["news"]
    hidden, nonsense = await call("sk-t", "GET", "/v1/experts/secret"), await call("sk-t", "GET", "/v1/experts/zzz")
    assert hidden.status_code == 404
    assert same(hidden, nonsense)
    permissions = await call("sk-admin", "GET", "/v1/organization/projects/t/expert_permissions")
    assert permissions.json()["expert_ids"] == ["news", "secret"]
    assert "secret" in (await call("sk-admin", "GET", "/v1/policy/explain?project_id=t")).json()["hidden"]


async def test_a_hidden_expert_leaves_no_trace_in_metrics(call: Any) -> None:
    for name in ("secret", "zzz"):
        body = {"prompt": "x", "flexgate": {"experts": {"only": [name]}}}
        await call("sk-t", "POST", "/v1/completions", json=body)
        await call("sk-t", "GET", f"/v1/experts/{name}")
    metrics = (await call("sk-auditor", "GET", "/metrics")).text
    assert "secret" not in metrics
    assert "zzz" not in metrics
