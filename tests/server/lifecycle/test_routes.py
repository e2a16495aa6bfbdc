"""The routes of the running application, against the list that was reviewed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from flexgate.server.lifecycle.app import build_app

MANIFEST = Path(__file__).parents[1] / "golden" / "routes.txt"
OPEN = {"/.well-known/jwks.json", "/health", "/ready"}


def manifest() -> list[list[str]]:
    """Method, path, the roles of keys that it takes, and whether it reaches the engine."""
    lines = MANIFEST.read_text().splitlines()
    return [line.split() for line in lines if line and not line.startswith("#")]


def test_the_application_has_exactly_the_reviewed_routes(services: Any) -> None:
    served = {
        (method, route.path)  # type: ignore[attr-defined]
        for route in build_app(services).routes
        for method in route.methods - {"HEAD"}  # type: ignore[attr-defined]
    }
    assert served == {(method, path) for method, path, *_ in manifest()}


@pytest.mark.asyncio
@pytest.mark.parametrize("line", manifest(), ids=lambda line: " ".join(line[:2]))
async def test_only_probes_and_public_keys_answer_without_a_key(
    make_client: Callable[..., httpx.AsyncClient], handler: Any, line: list[str]
) -> None:
    method, path, who, _ = line
    async with make_client(None) as http:
        response = await http.request(method, _concrete(path), json={})
    assert (response.status_code == 401) == (path not in OPEN)
    assert (who == "anyone") == (path in OPEN)
    assert not handler.seen


@pytest.mark.asyncio
@pytest.mark.parametrize("line", manifest(), ids=lambda line: " ".join(line[:2]))
async def test_each_route_answers_the_roles_it_is_for(
    make_client: Callable[..., httpx.AsyncClient], line: list[str]
) -> None:
    method, path, who, _ = line
    keys = {"tenant": "sk-t", "admin": "sk-admin", "auditor": "sk-auditor", "owner": "sk-owner"}
    may = set(keys) if who in ("anyone", "any-key") else set(who.split("|"))
    for role, secret in keys.items():
        async with make_client(secret) as http:
            response = await http.request(method, _concrete(path), json={})
        assert (response.status_code == 403) == (role not in may), (role, response.text)


@pytest.mark.asyncio
@pytest.mark.parametrize("line", manifest(), ids=lambda line: " ".join(line[:2]))
async def test_only_generating_routes_reach_the_engine_and_only_with_a_gate(
    client: httpx.AsyncClient, handler: Any, line: list[str]
) -> None:
    method, path, _, reaches = line
    body = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        "/v1/completions": {"prompt": "x"},
        "/v1/responses": {"input": "x"},
        "/tokenize": {"prompt": "x"},
        "/detokenize": {"tokens": [1]},
    }.get(path, {})
    handler.result = RuntimeError("reached")
    await client.request(method, _concrete(path), json=body)
    gated = [call for call in handler.calls if call is not None]
    assert bool(gated) == (reaches == "gated")
    assert all(call.experts for call in gated)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions/",
        "//v1/completions",
        "/v1/completions/render",
        "/v1/chat/completions/batch",
        "/v1/responses/resp_1",
        "/v1/messages",
        "/invocations",
        "/generative_scoring",
        "/v1/load_lora_adapter",
        "/scale_elastic_ep",
        "/inference/v1/abort_requests",
        "/docs",
        "/openapi.json",
        "/tokenizer_info",
        "/version",
        "/load",
        "/ping",
    ],
)
async def test_vllms_other_routes_do_not_exist(client: httpx.AsyncClient, path: str) -> None:
    for method in ("GET", "POST"):
        response = await client.request(method, path, json={})
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "unknown_path"


def _concrete(path: str) -> str:
    ids = {
        "{model:path}": "tiny",
        "{expert}": "news",
        "{project_id}": "t",
        "{agreement_id}": "a-news",
        "{rate_limit_id}": "rl-project",
    }
    for name, id_ in ids.items():
        path = path.replace(name, id_)
    return path
