"""The outermost layer: ids, hosts, errors, logs."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from flexgate.policies.audit import DENIED
from flexgate.policies.documents import Role
from flexgate.policies.errors import StoreUnavailable
from flexgate.server.http.logs import FIELDS, JsonFormatter
from flexgate.server.lifecycle.app import build_app
from flexgate.server.policy.denial_log import ANONYMOUS
from flexgate.server.policy.source import PolicySource

CANARY = "zebra-canary-prompt"


@pytest.mark.asyncio
async def test_the_request_id_is_ours_whatever_the_client_sends(client: httpx.AsyncClient) -> None:
    response = await client.get("/health", headers={"x-request-id": "mine"})
    assert response.headers["x-request-id"].startswith("req_")
    assert len(response.headers["x-request-id"]) == 36


@pytest.mark.asyncio
async def test_there_is_no_cross_origin_access(client: httpx.AsyncClient) -> None:
    headers = {"origin": "http://evil.test", "access-control-request-method": "POST"}
    response = await client.options("/v1/completions", headers=headers)
    assert response.status_code == 405
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("evil.test", 400),
        ("127.0.0.1.evil.test", 400),
        ("localhost:80:80", 400),
        ("", 400),
    ],
)
async def test_the_demo_answers_only_under_loopback_names(
    make_client: Callable[..., httpx.AsyncClient], host: str, status: int
) -> None:
    from flexgate.server.lifecycle.settings import DEMO_HOSTS

    async with make_client(hosts=DEMO_HOSTS) as http:
        response = await http.get("/health", headers={"host": host})
    assert response.status_code == status


@pytest.mark.asyncio
@pytest.mark.parametrize("error", [RuntimeError(CANARY), KeyError(CANARY), MemoryError(CANARY)])
async def test_a_failure_inside_is_told_without_its_words(
    client: httpx.AsyncClient, handler: Any, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    handler.result = error
    with caplog.at_level(logging.DEBUG, "flexgate"):
        response = await client.post("/v1/completions", json={"prompt": CANARY})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert CANARY not in response.text
    lines = [JsonFormatter().format(record) for record in caplog.records]
    assert any(json.loads(line).get("exception") for line in lines)
    assert not [line for line in lines if CANARY in line]


@pytest.mark.asyncio
async def test_a_failure_of_the_policy_store_is_503(client: httpx.AsyncClient, services: Any, store: Any) -> None:
    store.answer = StoreUnavailable("locked")
    services.policy._confirmed = -1e9
    response = await client.post("/v1/completions", json={"prompt": "x"})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "policy_unavailable"
    assert (await client.get("/ready")).status_code == 503


@pytest.mark.asyncio
@pytest.mark.parametrize("error", [StoreUnavailable("locked"), RuntimeError("a bug")], ids=["store", "bug"])
async def test_a_denied_request_is_noted_also_when_nobody_can_say_whose_key_it_was(
    services: Any, store: Any, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """The policy's lease runs out between the last look at it and its use."""
    times = iter((0.0, 0.0, 0.0))
    services.policy = PolicySource(store, dict, lease_s=1.0, poll_s=1.0, clock=lambda: next(times, 9.0))
    services.policy.confirm()
    store.answer, asked = error, store.asked
    caplog.set_level(logging.INFO, "flexgate.server.http.middleware")
    escapes = pytest.raises(RuntimeError) if isinstance(error, RuntimeError) else contextlib.nullcontext()
    transport = httpx.ASGITransport(build_app(services, roles=[Role.TENANT]))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        with escapes:
            await http.get("/v1/experts", headers={"authorization": "Bearer sk-admin"})
    assert store.asked == asked + 1
    assert [(record.getMessage(), getattr(record, FIELDS)["status"]) for record in caplog.records] == [("request", 401)]
    services.denials.flush()
    (entry,) = [entry for entry in services.store.audit_log(limit=100) if entry.action == DENIED]
    assert (entry.actor, entry.detail["code"]) == (ANONYMOUS, "invalid_api_key")


@pytest.mark.asyncio
async def test_readiness_says_a_status_and_nothing_else(client: httpx.AsyncClient, services: Any) -> None:
    assert (await client.get("/ready")).json() == {"status": "ready"}
    services.draining = True
    stopped = await client.get("/ready")
    assert (stopped.status_code, stopped.json()) == (503, {"status": "not_ready"})
    assert (await client.get("/health")).json() == {"status": "ok"}


@pytest.mark.asyncio
async def test_an_engine_that_is_not_proved_is_not_ready(client: httpx.AsyncClient, services: Any) -> None:
    services.client.ready = lambda: False
    assert (await client.get("/ready")).status_code == 503


@pytest.mark.asyncio
async def test_one_line_says_who_asked_what_and_nothing_of_the_text(
    client: httpx.AsyncClient, handler: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "flexgate"):
        await client.post(f"/{CANARY}?{CANARY}", json={"prompt": CANARY}, headers={"x-canary": CANARY})
        await client.post("/v1/completions", json={"prompt": CANARY, CANARY: 1, "n": CANARY})
        await client.post("/v1/completions", json={"prompt": CANARY, "model": CANARY})
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    assert [line["route"] for line in lines] == ["unmatched", *["/v1/completions"] * 2]
    assert [line["code"] for line in lines][1:] == ["unknown_parameter", "model_not_found"]
    assert lines[1]["tenant"] == "t"
    assert lines[1]["key"] == "key_sk-t"
    assert CANARY not in json.dumps(lines)


@pytest.mark.asyncio
async def test_metrics_have_no_client_text(make_client: Callable[..., httpx.AsyncClient], handler: Any) -> None:
    async with make_client() as http:
        await http.get(f"/{CANARY}")
        await http.get(f"/v1/models/{CANARY}")
        assert (await http.get("/metrics")).status_code == 403
    async with make_client("sk-auditor") as http:
        response = await http.get("/metrics")
    assert response.status_code == 200
    assert CANARY not in response.text
    assert 'flexgate_requests_total{route="unmatched",status="404"}' in response.text
    assert "flexgate_ready 1.0" in response.text
    assert "flexgate_policy_version 7.0" in response.text
    assert "flexgate_weights_epoch 3.0" in response.text


@pytest.mark.asyncio
async def test_a_tenant_sees_listed_experts_only(
    make_client: Callable[..., httpx.AsyncClient],
) -> None:
    async with make_client() as http:
        listed = (await http.get("/v1/experts")).json()["data"]
        hidden = await http.get("/v1/experts/secret")
        unknown = await http.get("/v1/experts/nonsense")
    assert [(e["id"], e["allowed"]) for e in listed] == [
        ("public", True),
        ("news", True),
        ("math", False),
    ]
    assert hidden.status_code == unknown.status_code == 404
    assert hidden.content == unknown.content
    async with make_client("sk-admin") as http:
        everything = (await http.get("/v1/experts")).json()["data"]
    assert [e["id"] for e in everything] == ["public", "news", "math", "secret"]


@pytest.mark.asyncio
async def test_a_long_query_string_is_refused_before_it_is_taken_apart(
    make_client: Callable[..., httpx.AsyncClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    from starlette.requests import Request

    monkeypatch.setattr(Request, "query_params", property(lambda _: pytest.fail("taken apart")))
    async with make_client("sk-admin") as http:
        refused = await http.get("/v1/organization/projects?" + "&".join(["a=1"] * 2100))
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_value")
