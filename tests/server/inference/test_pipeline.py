"""A generating request from its key to its gate, with handlers that stand for vLLM's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import httpx
import pytest
from inferencekit import PATH, completion
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from flexgate.policies.cache import DecisionCache
from flexgate.policies.errors import StoreUnavailable
from flexgate.policies.snapshot import Snapshot
from flexgate.server.engine.frontend.calls import CURRENT_CALL, GatedCall
from flexgate.server.http import auth
from flexgate.server.http.auth import WRONG_KEY
from flexgate.server.inference import generation, pipeline
from flexgate.server.inference.enforcement import RunningRequests
from flexgate.server.inference.pipeline import InferenceRequest

Body = dict[str, Any]


@pytest.mark.asyncio
async def test_a_handler_gets_honoured_fields_and_the_gate(client: httpx.AsyncClient, handler: Any) -> None:
    handler.result = completion
    response = await client.post(
        PATH,
        json={
            "prompt": "x",
            "model": "alias",
            "n": 2,
            "user": "u",
            "cache_salt": "pepper",
            "flexgate": {"experts": {"ignore": ["news"]}},
        },
        headers={"x-vllm-priority": "-9", "x-data-parallel-rank": "3", "x-session-id": "s"},
    )
    assert response.status_code == 200
    (request,), (call,) = handler.seen, handler.calls
    assert isinstance(request, CompletionRequest)
    assert (request.n, request.user, request.cache_salt, request.priority) == (2, None, None, 0)
    assert not request.model_extra
    assert request.request_id == response.headers["x-request-id"].removeprefix("req_")
    assert call.client_salt == "pepper"
    assert isinstance(call, GatedCall)
    assert [ref.expert for ref in call.experts] == ["public"]
    assert call.tenant == "t"
    assert CURRENT_CALL.get() is None


@pytest.mark.asyncio
async def test_an_expert_that_has_just_gone_is_no_reason_to_serve_without_it(
    client: httpx.AsyncClient, services: Any, handler: Any
) -> None:
    del services.client.refs["news"]
    response = await client.post(PATH, json={"prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "experts_changing")
    assert not handler.seen


@pytest.mark.asyncio
async def test_no_more_sets_of_experts_are_remembered_than_there_is_room_for(
    client: httpx.AsyncClient, services: Any, handler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler.result = completion
    monkeypatch.setattr(pipeline, "MAX_GATES", 1)
    for ignored, allowed in (([], ("public", "news")), ([], ("public", "news")), (["news"], ("public",))):
        response = await client.post(PATH, json={"prompt": "x", "flexgate": {"experts": {"ignore": ignored}}})
        assert response.status_code == 200
        assert set(services.client.gates) == {allowed}
        assert [ref.expert for ref in handler.calls[-1].experts] == list(allowed)


@pytest.mark.asyncio
async def test_tools_reach_the_handler_when_a_choice_can_be_kept(
    client: httpx.AsyncClient, handler: Any, services: Any
) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    body = {"messages": [{"role": "user", "content": "x"}], "tools": tools}
    named = {"type": "function", "function": {"name": "f"}}
    handler.result = ValueError("reached")
    for choice in ("required", "none", named):
        await client.post("/v1/chat/completions", json={**body, "tool_choice": choice})
    assert len(handler.seen) == 3
    services.limits = replace(services.limits, has_tool_parser=True)
    await client.post("/v1/chat/completions", json={**body, "tool_choice": "auto"})
    await client.post("/v1/chat/completions", json=body)
    assert len(handler.seen) == 5
    assert all(isinstance(request, ChatCompletionRequest) for request in handler.seen)


@pytest.mark.asyncio
@pytest.mark.parametrize("has_parser", [True, False])
async def test_forced_calls_are_not_left_to_a_parsers_own_format(
    client: httpx.AsyncClient, handler: Any, services: Any, has_parser: bool
) -> None:
    services.limits = replace(services.limits, has_tool_parser=has_parser)
    services.handlers.chat = services.handlers.responses = None
    handler.result = ValueError("reached")
    function = {"name": "f", "parameters": {"type": "object"}}
    chat = {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": function}]}
    spoken = {"input": "x", "tools": [{"type": "function", **function}]}
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        await client.post("/v1/chat/completions", json={**chat, "tool_choice": choice})
    for choice in ("required", {"type": "function", "name": "f"}):
        await client.post("/v1/responses", json={**spoken, "tool_choice": choice})
    assert len(handler.seen) == 4
    other = await client.post("/v1/responses", json={**spoken, "tool_choice": {"type": "allowed_tools"}})
    assert (other.status_code, other.json()["error"]["param"]) == (400, "tool_choice.type")


@pytest.mark.asyncio
async def test_models_say_how_long_a_prompt_may_be(client: httpx.AsyncClient, services: Any) -> None:
    card = (await client.get("/v1/models/tiny")).json()
    assert card["max_model_len"] == services.limits.prompt_tokens


@pytest.mark.asyncio
async def test_a_policy_that_comes_between_its_admission_and_its_start_ends_a_request(
    client: httpx.AsyncClient, handler: Any, services: Any, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler.result = completion
    begin = services.running.begin

    def begin_after_the_newer_policy(*args: Any) -> None:
        store.answer = replace(store.answer, policy_version=8, agreements=MappingProxyType({}))
        services.policy.confirm()
        begin(*args)

    monkeypatch.setattr(services.running, "begin", begin_after_the_newer_policy)
    response = await client.post(PATH, json={"prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "expert_permission_ended")
    assert handler.seen == []


def between_authentication_and_decision(services: Any, monkeypatch: pytest.MonkeyPatch, newer: Snapshot) -> Body:
    """A body that waits for `newer`, which comes then."""
    at_least = services.policy.at_least

    async def after_it_came(version: int) -> Snapshot:
        services.policy._store.answer = newer
        services.policy.confirm()
        return await at_least(version)

    monkeypatch.setattr(services.policy, "at_least", after_it_came)
    return {"prompt": "x", "flexgate": {"min_policy_version": newer.policy_version}}


@pytest.mark.asyncio
async def test_a_key_that_is_revoked_before_the_decision_gets_no_gate_of_the_policy_that_revokes_it(
    client: httpx.AsyncClient, handler: Any, services: Any, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where requests that run may finish when their key goes."""
    handler.result = completion
    services.running = RunningRequests(
        services.client, clock=services.clock, policy=services.policy, revoked_keys="finish"
    )
    keys = {digest: replace(key, revoked=1.0) for digest, key in snapshot.keys.items()}
    newer = replace(snapshot, policy_version=8, keys=MappingProxyType(keys))
    response = await client.post(PATH, json=between_authentication_and_decision(services, monkeypatch, newer))
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    assert handler.seen == []


@pytest.mark.asyncio
async def test_key_and_gate_are_judged_by_one_version_of_the_policy_at_one_time(
    client: httpx.AsyncClient, handler: Any, services: Any, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[tuple[str, int, float]] = []
    really_recognise = auth.recognise

    def recognise(known: Snapshot, digest: bytes, now: float, roles: Any) -> Any:
        judged.append(("key", known.policy_version, now))
        return really_recognise(known, digest, now, roles)

    def decide(known: Snapshot, tenant: str, request: Any, now: float) -> Any:
        judged.append(("gate", known.policy_version, now))
        return DecisionCache().decide(known, tenant, request, now)

    monkeypatch.setattr("flexgate.server.inference.pipeline.recognise", recognise)
    monkeypatch.setattr(services.decisions, "decide", decide)
    handler.result = completion
    newer = replace(snapshot, policy_version=8)
    response = await client.post(PATH, json=between_authentication_and_decision(services, monkeypatch, newer))
    (_, key_version, key_time), (_, gate_version, gate_time) = judged[-2:]
    assert [what for what, _, _ in judged[-2:]] == ["key", "gate"]
    assert (key_version, key_time) == (gate_version, gate_time)
    assert response.json()["flexgate"]["policy_version"] == gate_version == 8


@pytest.mark.asyncio
async def test_a_body_is_kept_no_longer_than_it_takes_to_validate_it(
    client: httpx.AsyncClient, handler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[InferenceRequest] = []
    monkeypatch.setattr(generation, "begin", begun.append)
    handler.result = completion
    await client.post(PATH, json={"prompt": "x", "metadata": [[]] * 10_000})
    assert [hasattr(request, "raw") for request in begun] == [False]
    assert "metadata" not in begun[0].body


@pytest.mark.asyncio
async def test_a_policy_that_cannot_be_confirmed_once_the_body_is_there_decides_nothing(
    client: httpx.AsyncClient, handler: Any, services: Any, store: Any
) -> None:
    async def content() -> AsyncIterator[bytes]:
        yield b'{"prompt": '
        store.answer = StoreUnavailable("away")
        services.policy._confirmed = -float("inf")
        services.policy._lease_s = 0.05
        yield b'"x"}'

    response = await client.post(PATH, content=content(), headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "policy_unavailable")
    assert handler.seen == []


@pytest.mark.asyncio
async def test_a_project_that_is_archived_between_key_and_decision_is_no_other_than_one_that_was(
    client: httpx.AsyncClient, services: Any, snapshot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    archived = {name: replace(tenant, archived=True) for name, tenant in snapshot.tenants.items()}

    async def newer(_version: int) -> Any:
        return replace(snapshot, policy_version=8, tenants=MappingProxyType(archived))

    monkeypatch.setattr(services.policy, "at_least", newer)
    response = await client.post(PATH, json={"prompt": "x", "flexgate": {"min_policy_version": 8}})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["message"]) == (401, "invalid_api_key", WRONG_KEY)
    assert response.headers["www-authenticate"] == "Bearer"
