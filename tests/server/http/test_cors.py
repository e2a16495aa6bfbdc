"""Web pages may call the tenants' routes where an operator has named their origin."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from flexgate.policies.documents import Role
from flexgate.server.lifecycle.app import build_app, build_listeners
from flexgate.server.lifecycle.settings import load_settings
from flexgate.server.lifecycle.store_settings import SettingsError

PAGE = "https://app.example.com"
ASKS = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang",
}


def client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.mark.asyncio
async def test_a_page_of_a_named_origin_may_ask_and_read_our_headers(services: Any) -> None:
    async with client(build_app(services, origins=[PAGE])) as http:
        before = await http.options("/v1/chat/completions", headers=ASKS)
        assert (before.status_code, before.headers["access-control-allow-origin"]) == (200, PAGE)
        assert "x-stainless-lang" in before.headers["access-control-allow-headers"]
        answer = await http.get("/v1/models", headers={"origin": PAGE, "authorization": "Bearer sk-t"})
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert answer.headers["access-control-expose-headers"] == "*"
        refused = await http.get("/v1/models", headers={"origin": PAGE})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)


@pytest.mark.asyncio
async def test_a_page_of_another_origin_may_not(services: Any) -> None:
    async with client(build_app(services, origins=[PAGE])) as http:
        before = await http.options("/v1/chat/completions", headers={**ASKS, "origin": "https://elsewhere.example"})
        assert before.status_code == 400
        assert "access-control-allow-origin" not in before.headers


@pytest.mark.asyncio
async def test_no_page_may_where_no_origin_is_named_nor_at_the_administrations_address(services: Any) -> None:
    admin = build_listeners(services, ("127.0.0.1", 1), origins=[PAGE])._admin
    for app in (build_app(services), build_app(services, roles=set(Role)), admin):
        async with client(app) as http:
            answer = await http.get("/health", headers={"origin": PAGE})
            assert "access-control-allow-origin" not in answer.headers


OPERATORS = [
    ("POST", "/v1/organization/projects"),
    ("GET", "/v1/organization/audit_logs"),
    ("POST", "/v1/organization/admin_api_keys"),
    ("POST", "/v1/agreements"),
    ("POST", "/v1/policy/rollback"),
    ("POST", "/v1/experts"),
    ("DELETE", "/v1/experts/news"),
    ("POST", "/v1/expert_uploads"),
    ("GET", "/metrics"),
]


@pytest.mark.parametrize("origin", [PAGE, "*"])
@pytest.mark.parametrize(("method", "path"), OPERATORS)
@pytest.mark.asyncio
async def test_no_page_may_administer_where_one_port_serves_all(
    services: Any, method: str, path: str, origin: str
) -> None:
    async with client(build_app(services, origins=[origin])) as http:
        before = await http.options(path, headers={**ASKS, "access-control-request-method": method})
        answer = await http.request(method, path, headers={"origin": PAGE, "authorization": "Bearer sk-admin"})
    for told in (before, answer):
        assert not [name for name in told.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"])
@pytest.mark.asyncio
async def test_a_page_may_use_every_route_of_inference(services: Any, path: str) -> None:
    async with client(build_app(services, origins=[PAGE])) as http:
        assert (await http.options(path, headers=ASKS)).headers["access-control-allow-origin"] == PAGE


@pytest.mark.parametrize("origin", ["app.example.com", "https://app.example.com/path", "null", "https://"])
def test_an_origin_is_a_scheme_and_a_host(origin: str) -> None:
    with pytest.raises(SettingsError, match="is not an origin: give a scheme and a host"):
        load_settings(demo=True, cors_origin=(origin,))
