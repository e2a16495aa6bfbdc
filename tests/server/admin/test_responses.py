"""Every response of the administration is what the OpenAPI document says it is, errors included."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pydantic_core
import pytest
from described import conform, described, place_of
from pydantic import ValidationError

from flexgate.policies.documents import Role
from flexgate.policies.store import Store, accounts
from flexgate.server.admin import router
from flexgate.server.admin.agreements.schemas import AgreementDeleted
from flexgate.server.admin.operation import Nothing
from flexgate.server.admin.operations import OPERATIONS
from flexgate.server.experts.revoke import Revocation
from flexgate.server.ledger.entries import COMPLETED, RegisteredExpert, Registration, Used
from flexgate.server.ledger.journal import Journal

AGREEMENT = {"experts": ["math"], "assignee": "tenant:t", "effect": "permit", "owner": "academy"}
FILE = {"format": "flexgate-policy/v1", "tenants": [{"id": "t", "name": "t", "expert_ids": ["math"]}]}
Case = tuple[str, str, str, Any]
BODILESS = [operation for operation in OPERATIONS if operation.body is Nothing and Role.ADMIN in operation.roles]


@pytest.fixture
def services(services: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """With packages to add, and experts that an engine would revoke."""
    (tmp_path / "packages" / "news").mkdir(parents=True)
    services.experts_dir = tmp_path / "packages"

    async def revoke(expert: str, **_: Any) -> dict[str, Any]:
        done = Revocation(expert, 1, 1, 4, 1.0)
        return {"object": "expert.revocation", **asdict(done), "effective_at": 2.0}

    monkeypatch.setattr(services.experts, "revoke", revoke)
    opened = services.experts.jobs.open
    monkeypatch.setattr(services.experts, "start_add", lambda source, **more: opened(source.name, more["actor"], "x"))
    return services


@pytest.fixture
def ids(services: Any, real_store: Store) -> dict[str, str]:
    """Of objects that there are."""
    account, spare = (
        accounts.create_service_account(real_store, "t", name, actor="test", at=2.0) for name in ("robot", "spare")
    )
    by_role = {key.role: key.key_id for key in accounts.list_admin_keys(real_store)}
    files = {"manifest.json": 1, "expert.safetensors": 1}
    return {
        "account": account[0].id,
        "key": spare[1].record.key_id,
        "admin_key": by_role[Role.AUDITOR],
        "version": str(real_store.version()),
        "job": services.experts.jobs.open("news", "key_admin", "key_admin").id,
        "upload": services.uploads.open(by_role[Role.ADMIN], files).id,
        "receipt": _with_receipt(services),
    }


def _with_receipt(services: Any) -> str:
    """The id of a request that has a receipt."""

    async def record() -> str:
        journal = Journal(services.ledger.path, clock=lambda: 1.0)
        experts = (RegisteredExpert(0, "news", "gazette", "a-news", 1),)
        entry = journal.register(Registration(f"dec_{1:032x}", 5, "t", "key", "/v1", "tiny", 1, 3, experts))
        entry.end(COMPLETED, Used(2, 0, 3, [6, 2], [3, 3]))
        await entry.registered()
        journal.close()
        return entry.registration.request

    name = asyncio.run(record())
    services.receipts.maker.work()
    return name


CORRECTION = {"receipt_id": f"dec_{1:032x}", "reason": "counted twice"}
PAID_BACK = {"kind": "correction", "amount": "-0.5", "currency": "EUR", "dispute_id": "dispute"}


def cases(ids: dict[str, str]) -> list[Case]:
    """What succeeds, once of each operation and role that sees something else: key, method, path, body."""
    projects, admin = "/v1/organization/projects", "sk-admin"
    one, account = f"{projects}/t", f"/service_accounts/{ids['account']}"
    keys, uploads = "/v1/organization/admin_api_keys", f"/v1/expert_uploads/{ids['upload']}"
    return [
        (admin, "POST", projects, {"name": "new"}),
        (admin, "GET", projects, None),
        (admin, "GET", one, None),
        ("sk-t", "GET", one, None),
        (admin, "POST", one, {"flexgate": {"default_experts": ["news"]}}),
        (admin, "POST", f"{projects}/u/archive", None),
        (admin, "GET", f"{projects}?include_archived=true", None),
        (admin, "GET", f"{one}/expert_permissions", None),
        (admin, "POST", f"{one}/expert_permissions", {"mode": "allow_list", "expert_ids": ["news"]}),
        (admin, "DELETE", f"{one}/expert_permissions", None),
        (admin, "POST", f"{one}/service_accounts", {"name": "robot", "expires_in_seconds": 60}),
        (admin, "GET", f"{one}/service_accounts", None),
        (admin, "GET", f"{one}{account}", None),
        (admin, "DELETE", f"{one}{account}", None),
        (admin, "GET", f"{one}/api_keys", None),
        (admin, "GET", f"{one}/api_keys/{ids['key']}", None),
        (admin, "DELETE", f"{one}/api_keys/{ids['key']}", None),
        (admin, "POST", keys, {"name": "owner", "role": "owner", "owner_id": "gazette"}),
        (admin, "GET", keys, None),
        (admin, "GET", f"{keys}/{ids['admin_key']}", None),
        (admin, "DELETE", f"{keys}/{ids['admin_key']}", None),
        (admin, "GET", f"{one}/rate_limits", None),
        ("sk-t", "GET", f"{one}/rate_limits", None),
        (admin, "POST", f"{one}/rate_limits/rl-project", {"max_total_tokens": 7}),
        (admin, "GET", "/v1/agreements", None),
        ("sk-owner", "GET", "/v1/agreements", None),
        (admin, "POST", "/v1/agreements", AGREEMENT),
        (admin, "GET", "/v1/agreements/a-math", None),
        (admin, "POST", "/v1/agreements/a-math", {**AGREEMENT, "not_after": "2099-01-01T00:00:00Z"}),
        (admin, "DELETE", "/v1/agreements/a-math", None),
        (admin, "POST", "/v1/expert_sets", {"id": "set:numbers", "experts": ["math"]}),
        (admin, "GET", "/v1/expert_sets", None),
        (admin, "GET", "/v1/expert_sets/set:numbers", None),
        (admin, "POST", "/v1/expert_sets/set:numbers", {"experts": ["math", "news"]}),
        (admin, "DELETE", "/v1/expert_sets/set:numbers", None),
        (admin, "GET", "/v1/policy/explain?project_id=t", None),
        ("sk-t", "GET", "/v1/policy/explain", None),
        (admin, "POST", "/v1/policy/simulate", {"policy": FILE}),
        (admin, "GET", "/v1/policy/file", None),
        (admin, "POST", "/v1/policy/apply", {"policy": FILE, "dry_run": True}),
        (admin, "POST", "/v1/policy/apply", {"policy": FILE}),
        (admin, "GET", "/v1/policy/revisions", None),
        (admin, "GET", f"/v1/policy/diff?old=1&new={ids['version']}", None),
        (admin, "GET", "/v1/organization/audit_logs?limit=100", None),
        (admin, "POST", "/v1/organization/audit_logs/trim", {"older_than_days": 1}),
        (admin, "GET", "/v1/organization/usage/completions?start_time=0&group_by[]=expert_id", None),
        (admin, "GET", "/v1/organization/costs?start_time=0&group_by[]=line_item", None),
        ("sk-owner", "GET", "/v1/statements/2025-01", None),
        (admin, "GET", "/v1/statements/2025-01-31?owner_id=gazette", None),
        ("sk-owner", "POST", "/v1/corrections", {**CORRECTION, "kind": "dispute", "id": "dispute"}),
        (admin, "POST", "/v1/corrections", {**CORRECTION, "id": "credit", "owner_id": "gazette", **PAID_BACK}),
        (admin, "GET", "/v1/corrections", None),
        ("sk-owner", "GET", "/v1/statements", None),
        ("sk-owner", "GET", "/v1/statements/1970-01/signed", None),
        (admin, "POST", "/v1/statements/1970-01/closing/preview", {"owner_id": "gazette"}),
        (admin, "POST", "/v1/statements/1970-01/closing", {"owner_id": "gazette"}),
        ("sk-owner", "GET", "/v1/statements/1970-01/closing", None),
        (admin, "GET", "/v1/statements/1970-01?owner_id=gazette", None),
        (admin, "GET", "/v1/statements/1970-01/owners", None),
        ("sk-owner", "GET", "/v1/statements/1970-01/receipts", None),
        (admin, "GET", f"/v1/statements/1970-01/receipts/{ids['receipt']}?owner_id=gazette", None),
        (admin, "GET", f"/v1/receipts/{ids['receipt']}", None),
        ("sk-t", "GET", f"/v1/receipts/{ids['receipt']}", None),
        ("sk-owner", "GET", f"/v1/receipts/{ids['receipt']}", None),
        (admin, "GET", "/v1/receipt_batches", None),
        (admin, "GET", "/v1/experts", None),
        ("sk-t", "GET", "/v1/experts", None),
        ("sk-t", "GET", "/v1/experts/math", None),
        (admin, "GET", "/v1/experts/news", None),
        (admin, "POST", "/v1/experts", {"package": "news"}),
        (admin, "GET", f"/v1/expert_jobs/{ids['job']}", None),
        (admin, "DELETE", "/v1/experts/news", None),
        (admin, "POST", "/v1/expert_uploads", {"files": {"manifest.json": 1, "expert.safetensors": 1}}),
        (admin, "GET", uploads, None),
        (admin, "PATCH", f"{uploads}/manifest.json?offset=0", b"{"),
        (admin, "DELETE", uploads, None),
    ]


@pytest.mark.asyncio
async def test_whatever_succeeds_is_answered_as_it_is_described(call: Any, ids: dict[str, str]) -> None:
    """In the order of the cases: what some make is read by others."""
    answered = set()
    for key, method, path, body in cases(ids):
        sent = {"content": body} if isinstance(body, bytes) else {"json": body}
        response = await call(key, method, path, **sent)
        assert response.status_code < 300, (method, path, response.text)
        conform(response)
        answered.add((method, path))
    version = int((await call("sk-admin", "GET", "/v1/policy/revisions?limit=1")).json()["data"][0]["version"])
    back = await call("sk-admin", "POST", "/v1/policy/rollback", json={"version": 1, "confirm": version})
    assert conform(back) == "200"
    exercised = {*map(_template, answered), ("POST", "/v1/policy/rollback")}
    assert exercised == {(operation.method, operation.path) for operation in OPERATIONS}


@pytest.mark.asyncio
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: f"{o.method} {o.path}")
async def test_a_refusal_is_answered_as_it_is_described(call: Any, operation: Any) -> None:
    path = operation.path.replace("{", "").replace("}", "")
    statuses = {}
    for key, query in ((None, ""), ("sk-admin", ""), ("sk-admin", "?unknown=1")):
        response = await call(key, operation.method, f"{path}{query}", json={"unknown": 1})
        if response.status_code >= 400:
            statuses[response.status_code] = conform(response)
    assert {401, 400} <= statuses.keys()
    assert set(statuses.values()) == {"4XX"}


@pytest.mark.asyncio
@pytest.mark.parametrize("operation", BODILESS, ids=lambda o: f"{o.method} {o.path}")
async def test_a_body_is_refused_where_none_is_taken_unless_it_is_empty(
    call: Any, real_store: Any, operation: Any
) -> None:
    path, version = operation.path.replace("{", "").replace("}", ""), real_store.version()
    summed = ("/v1/organization/usage/completions", "/v1/organization/costs")
    needed = {"/v1/policy/diff": "?old=1&new=1", **dict.fromkeys(summed, "?start_time=0")}
    path += needed.get(path, "")
    refused = await call("sk-admin", operation.method, path, json={"drain_seconds": 5})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "unknown_parameter", "drain_seconds")
    assert real_store.version() == version
    if operation.method == "GET":
        plain = await call("sk-admin", "GET", path)
        for empty in ({"json": {}}, {"content": _no_chunks()}):
            assert (await call("sk-admin", "GET", path, **empty)).status_code == plain.status_code


async def _no_chunks() -> AsyncIterator[bytes]:
    return
    yield


@pytest.mark.asyncio
@pytest.mark.parametrize(("key", "status"), [(None, 401), ("sk-t", 403)])
async def test_no_body_is_read_of_a_caller_who_is_refused(call: Any, key: str | None, status: int) -> None:
    read = []

    async def body() -> AsyncIterator[bytes]:
        read.append(1)
        yield b"{}"

    for operation in OPERATIONS:
        if Role.TENANT not in operation.roles:
            json = {"content-type": "application/json"}
            response = await call(key, operation.method, operation.path, content=body(), headers=json)
            assert response.status_code == status
    assert not read


@pytest.mark.asyncio
async def test_what_is_answered_is_written_in_a_thread(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()

    def to_json(value: Any) -> bytes:
        threads.add(threading.current_thread())
        return pydantic_core.to_json(value)

    monkeypatch.setattr(router, "to_json", to_json)
    for path in ("/v1/organization/projects", "/v1/organization/audit_logs", "/v1/policy/file", "/v1/agreements"):
        assert (await call("sk-admin", "GET", path)).status_code == 200
    assert threads
    assert threading.main_thread() not in threads


def test_a_response_has_no_field_that_is_not_described() -> None:
    with pytest.raises(ValidationError, match="more"):
        AgreementDeleted.model_validate({"id": "a", "more": 1})


def test_a_field_that_is_not_described_is_found() -> None:
    request = httpx.Request("DELETE", "http://test/v1/agreements/a")
    body = {"id": "a", "object": "agreement.deleted", "deleted": True}
    conform(httpx.Response(200, json=body, request=request))
    for wrong in ({**body, "more": 1}, {**body, "deleted": False}, {"id": "a", "deleted": True}):
        with pytest.raises(AssertionError, match="/v1/agreements"):
            conform(httpx.Response(200, json=wrong, request=request))
    with pytest.raises(AssertionError, match="does not describe 302"):
        conform(httpx.Response(302, json=body, request=request))


@pytest.mark.asyncio
async def test_errors_are_json_where_answers_are_not(call: Any) -> None:
    for key, status in (("sk-auditor", "200"), ("sk-t", "4XX"), (None, "4XX")):
        assert conform(await call(key, "GET", "/metrics")) == status


def test_every_operation_says_what_it_answers() -> None:
    for operation in OPERATIONS:
        responses = described()["paths"][operation.path][operation.method.lower()]["responses"]
        schema = responses[str(operation.status)]["content"]["application/json"]["schema"]
        assert "$ref" in schema or all("$ref" in option for option in schema["anyOf"]), operation.path
        assert responses["4XX"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorBody"}


def _template(place: tuple[str, str]) -> tuple[str, str]:
    found = place_of(httpx.Request(place[0], f"http://test{place[1]}"))
    assert found is not None
    return found
