"""With an administration port, the other one knows tenants alone, and that one everybody else."""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Any

import httpx
import pytest

from flexgate.policies.audit import DENIED, Entry
from flexgate.policies.documents import Role
from flexgate.server.lifecycle.app import build_app, document
from flexgate.server.policy.denial_log import ANONYMOUS

SHARED = {
    ("GET", "/.well-known/jwks.json"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/v1/experts"),
    ("GET", "/v1/experts/{expert}"),
    ("GET", "/v1/openapi.json"),
    ("GET", "/v1/organization/projects/{project_id}"),
    ("GET", "/v1/organization/projects/{project_id}/expert_permissions"),
    ("GET", "/v1/organization/projects/{project_id}/rate_limits"),
    ("GET", "/v1/policy/explain"),
    ("GET", "/v1/receipts/{receipt_id}"),
}
INFERENCE = {
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model:path}"),
    ("POST", "/detokenize"),
    ("POST", "/tokenize"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
}


def _routes(services: Any, *roles: Role) -> set[tuple[str, str]]:
    routes: Any = build_app(services, roles=roles).routes
    return {(method, route.path) for route in routes for method in route.methods - {"HEAD"}}


def test_the_public_address_has_the_reviewed_routes_and_no_other(services: Any) -> None:
    everything = _routes(services, *Role)
    assert _routes(services, Role.TENANT) == SHARED | INFERENCE
    assert _routes(services, Role.ADMIN, Role.AUDITOR, Role.OWNER) == everything - INFERENCE


async def _ask(method: str, url: str, key: str) -> tuple[int, bytes]:
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {key}"}) as http:
        answer = await http.request(method, url, json={})
    return answer.status_code, answer.content


@pytest.mark.asyncio
async def test_each_address_serves_its_own_keys_and_routes(urls: tuple[str, str], services: Any) -> None:
    public, admin = urls
    nonsense = await _ask("GET", f"{public}/v1/nonsense", "sk-admin")
    assert nonsense[0] == 404
    tenants = {path for _, path in SHARED | INFERENCE}
    operators = {(method, path) for method, path in _routes(services, *Role) if path not in tenants}
    assert len(operators) > 25
    for method, template in sorted(operators):
        path = re.sub(r"{\w+}", "x", template)
        for key in ("sk-admin", "sk-t"):
            assert await _ask(method, f"{public}{path}", key) == nonsense, path
        assert (await _ask(method, f"{admin}{path}", "sk-admin"))[1] != nonsense[1], path
    wrong = await _ask("GET", f"{public}/v1/experts", "sk-wrong")
    assert wrong[0] == 401
    assert await _ask("GET", f"{public}/v1/experts", "sk-admin") == wrong
    assert await _ask("GET", f"{admin}/v1/experts", "sk-t") == wrong
    assert (await _ask("GET", f"{public}/v1/experts", "sk-t"))[0] == 200
    assert (await _ask("GET", f"{admin}/v1/experts", "sk-admin"))[0] == 200


@pytest.mark.asyncio
async def test_the_administration_address_serves_no_inference(urls: tuple[str, str], handler: Any) -> None:
    public, admin = urls
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"):
        for key in ("sk-t", "sk-admin"):
            assert (await _ask("POST", f"{admin}{path}", key))[0] == 404
        assert (await _ask("POST", f"{public}{path}", "sk-t"))[0] != 404
    assert (await _ask("GET", f"{public}/v1/policy/explain", "sk-t"))[0] == 200
    assert not handler.seen


@pytest.mark.asyncio
async def test_each_address_describes_its_own_routes(urls: tuple[str, str]) -> None:
    public, admin = urls
    described = [
        (await _ask("GET", f"{address}/v1/openapi.json", key))[1].decode()
        for address, key in ((public, "sk-t"), (admin, "sk-admin"))
    ]
    assert ["/v1/chat/completions" in text for text in described] == [True, False]
    assert ["/v1/policy/simulate" in text for text in described] == [False, True]
    schemas = [set(json.loads(text)["components"]["schemas"]) for text in described]
    references = [set(re.findall(r'"#/components/schemas/([^"]+)"', text)) for text in described]
    assert schemas == references
    assert schemas[0] | schemas[1] == set(document()["components"]["schemas"])
    assert ["AgreementBody" in names for names in schemas] == [False, True]


# Where an administrator's key and a tenant's are strangers, and what the audit log calls it.
STRANGERS = [
    (0, "sk-admin", "GET", "/v1/organization/projects", "unmatched", 404, "administration_at_public_address"),
    (0, "sk-auditor", "GET", "/metrics", "unmatched", 404, "administration_at_public_address"),
    (0, "sk-owner", "POST", "/v1/experts", "unmatched", 405, "administration_at_public_address"),
    (0, "sk-admin", "GET", "/v1/experts", "/v1/experts", 401, "administration_at_public_address"),
    (1, "sk-t", "GET", "/v1/experts", "/v1/experts", 401, "inference_at_administration_address"),
    (1, "sk-t", "POST", "/v1/completions", "unmatched", 404, "inference_at_administration_address"),
]


@pytest.mark.asyncio
@pytest.mark.parametrize(("place", "key", "method", "path", "route", "status", "code"), STRANGERS)
async def test_a_key_at_the_wrong_address_is_audited_and_told_nothing(
    urls: tuple[str, str],
    services: Any,
    place: int,
    key: str,
    method: str,
    path: str,
    route: str,
    status: int,
    code: str,
) -> None:
    url = f"{urls[place]}{path}"
    answers = [await _answered(method, url, used) for used in (key, "sk-nobody", "sk-revoked")]
    assert answers[0][0] == status
    assert answers[0] == answers[1]
    deadline = time.monotonic() + 30
    while not (named := [entry for entry in _denied(services) if entry.actor != ANONYMOUS]):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    (entry,) = named
    assert entry.actor == f"key_{key}"
    assert entry.detail["code"] == code
    assert entry.detail["tenant_id"] == ("t" if key == "sk-t" else None)
    assert (entry.detail["route"], entry.detail["status"], entry.detail["requests"]) == (route, status, 1)
    assert code not in {entry.detail["code"] for entry in _denied(services) if entry.actor == ANONYMOUS}


async def _answered(method: str, url: str, key: str) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """All of an answer but its id and time."""
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {key}"}) as http:
        answer = await http.request(method, url, json={})
    headers = [(name, value) for name, value in answer.headers.raw if name.lower() not in (b"x-request-id", b"date")]
    return answer.status_code, headers, answer.content


def _denied(services: Any) -> list[Entry]:
    services.denials.flush()
    return [entry for entry in services.store.audit_log(limit=1000) if entry.action == DENIED]
