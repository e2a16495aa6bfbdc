"""The published description of the API: it is what is served, and what it generates breaks nothing."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from described import conform, place_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jsonschema.validators import Draft202012Validator
from policy_file import LIVE
from schemathesis import GenerationMode
from starlette.testclient import TestClient
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    ChatMessage,
)
from vllm.entrypoints.openai.completion.protocol import (
    CompletionRequest,
    CompletionResponse,
    CompletionResponseChoice,
)
from vllm.entrypoints.openai.responses.protocol import ResponsesResponse
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, DetokenizeResponse, TokenizeResponse

from flexgate.server.engine.frontend.calls import CURRENT_CALL
from flexgate.server.lifecycle import openapi
from flexgate.server.lifecycle.app import build_app, document
from flexgate.server.policy.source import PolicySource

MANIFEST = Path(__file__).parents[1] / "golden" / "routes.txt"
KEYS = {"tenant": "sk-t", "admin": "sk-admin", "auditor": "sk-auditor", "owner": "sk-owner"}
REAL_IDS = {
    "project_id": "t",
    "agreement_id": "a-news",
    "rate_limit_id": "rl-project",
    "model": "tiny",
    "expert": "news",
}
WITH_BODY, WITHOUT_BODY = 700, 60
# schemathesis gives up on spoiling the nested arrays of a policy file
NOT_NEGATED = {("POST", "/v1/policy/simulate"), ("POST", "/v1/policy/apply")}


def routes() -> dict[tuple[str, str], str]:
    """Who may ask, by method and path."""
    lines = [line.split() for line in MANIFEST.read_text().splitlines() if not line.startswith("#")]
    return {(method, path.replace(":path}", "}")): who for method, path, who, _ in lines}


OPERATIONS = sorted(routes())


def test_every_route_is_described_and_nothing_else() -> None:
    described = {(method.upper(), path) for path, methods in document()["paths"].items() for method in methods}
    assert described == routes().keys()


def test_the_description_names_what_it_refers_to() -> None:
    described = document()
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(described)))
    assert names == described["components"]["schemas"].keys()
    for schema in described["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


@pytest.mark.asyncio
async def test_any_key_may_read_it(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/openapi.json")).json() == document()


@pytest.mark.asyncio
async def test_it_is_made_once_and_off_the_event_loop(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []

    def seen(routes: Any) -> Any:
        threads.append(threading.get_ident())
        return document()

    monkeypatch.setattr(openapi, "described", seen)
    first, second = [(await client.get("/v1/openapi.json")).content for _ in range(2)]
    assert first == second
    assert len(threads) == 1
    assert threads != [threading.get_ident()]


async def _answer(request: Any, raw_request: Any = None) -> Any:
    """What vLLM's handlers would give."""
    call = CURRENT_CALL.get()
    if call is not None:
        assert {ref.expert for ref in call.experts} <= {"public", "news"}
    if getattr(request, "stream", False):
        return _events()
    if isinstance(request, ChatCompletionRequest):
        message = ChatMessage(role="assistant", content="x")
        choice = ChatCompletionResponseChoice(index=0, message=message)
        return ChatCompletionResponse(model="tiny", choices=[choice], usage=UsageInfo())
    if isinstance(request, DetokenizeRequest):
        return DetokenizeResponse(prompt="x")
    if isinstance(request, CompletionRequest):
        choices = [CompletionResponseChoice(index=0, text="x")]
        return CompletionResponse(model="tiny", choices=choices, usage=UsageInfo())
    return TokenizeResponse(count=1, max_model_len=64, tokens=[7])


async def _events() -> AsyncIterator[str]:
    yield 'data: {"choices":[{"index":0,"finish_reason":"stop"}]}\n\n'
    yield "data: [DONE]\n\n"


@pytest.fixture
def http(services: Any, real_store: Any) -> Iterator[TestClient]:
    """The application with handlers that answer, and all else real."""
    services.policy = PolicySource(real_store, lambda: LIVE, lease_s=60, poll_s=1)
    services.policy.confirm()
    for name in ("create_chat_completion", "create_completion", "create_tokenize", "create_detokenize"):
        for handlers in (services.handlers.chat, services.handlers.completion, services.handlers.tokenization):
            if hasattr(handlers, name):
                setattr(handlers, name, _answer)
    services.handlers.responses.create_responses = _responses
    with TestClient(build_app(services), raise_server_exceptions=False) as client:
        yield client


async def _responses(request: Any) -> Any:
    if request.stream:
        return _no_events()
    return ResponsesResponse.from_request(request, request.to_sampling_params(8), "tiny", 0, [], "completed", None)


async def _no_events() -> AsyncIterator[Any]:
    for event in ():
        yield event


@pytest.mark.slow
@pytest.mark.sliced(14)
@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=[" ".join(operation) for operation in OPERATIONS])
def test_whatever_is_generated_from_it_is_answered_in_form(http: TestClient, method: str, path: str) -> None:
    operation = schemathesis.openapi.from_dict(document())[path][method]
    who = routes()[method, path]
    may = set(KEYS) if who in ("anyone", "any-key") else set(who.split("|"))
    kinds = [GenerationMode.POSITIVE] + [GenerationMode.NEGATIVE] * ((method, path) not in NOT_NEGATED)
    modes = [operation.as_strategy(generation_mode=kind) for kind in kinds]
    wanted = WITH_BODY if operation.body else WITHOUT_BODY
    tried = 0

    @settings(
        max_examples=wanted,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(modes), st.sampled_from(sorted(KEYS)), st.booleans())
    def check(case: Any, role: str, real: bool) -> None:
        nonlocal tried
        tried += 1
        if real:
            case.path_parameters = {name: REAL_IDS.get(name, v) for name, v in case.path_parameters.items()}
        given = case.as_transport_kwargs(base_url="http://testserver")
        given["headers"] = {**given["headers"], "authorization": f"Bearer {KEYS[role]}"}
        given.pop("cookies", None)
        given["content"] = given.pop("data", None)
        _check(http.request(**given), role in may)

    check()
    assert tried >= wanted or not operation.body, "what has no body may run out of different requests"


@pytest.mark.slow
def test_these_are_ten_thousand_requests() -> None:
    paths = document()["paths"]
    bodies = sum("requestBody" in paths[path][method.lower()] for method, path in OPERATIONS)
    assert bodies * WITH_BODY >= 10_000


def _check(answer: httpx.Response, may: bool) -> None:
    """No server error, OpenAI's form, and nothing done for a key of another role."""
    if answer.status_code == 503 and answer.json()["error"]["code"] == "policy_version_not_reached":
        return
    assert answer.status_code < 500, answer.text
    assert may or answer.status_code >= 400, answer.text
    if answer.status_code >= 400:
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    if place_of(answer.request) is not None:
        conform(answer)
