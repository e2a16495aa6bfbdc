"""What a server answers whose operator requires an expert: with it, or not at all."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from flexgate.policies.snapshot import Snapshot

ENDPOINTS = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/responses": {"input": "x"},
}


def requiring(snapshot: Snapshot, world: Any, *, permitted: bool = True, revoked: bool = False) -> Snapshot:
    """A policy by which every request uses `math`, which tenant `t` has not on its list."""
    tenants, agreements = world
    return Snapshot.build(
        policy_version=snapshot.policy_version + 1,
        experts=[e.model_copy(update={"required": e.id == "math"}) for e in snapshot.experts.values()],
        tenants=tenants,
        agreements=[terms for terms in agreements if permitted or terms.id != "a-math"],
        keys=snapshot.keys.values(),
        revocation_epochs={"math": 2} if revoked else {},
    )


@pytest.fixture
def publish(store: Any, snapshot: Snapshot, world: Any, services: Any) -> Any:
    """Let the server learn of such a policy."""

    def publish(**how: bool) -> None:
        store.answer = requiring(snapshot, world, **how)
        services.policy.confirm()

    return publish


@pytest.mark.asyncio
@pytest.mark.parametrize("path", ENDPOINTS)
async def test_a_request_that_leaves_it_out_is_refused(client: httpx.AsyncClient, publish: Any, path: str) -> None:
    publish()
    body = {**ENDPOINTS[path], "flexgate": {"experts": {"ignore": ["math"]}}}
    response = await client.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "expert_required", "flexgate.experts.ignore")
    assert error["message"].startswith(
        "'flexgate.experts.ignore' names 'math', which every request to this server uses."
    )


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"permitted": False}, "No agreement permits this project to use expert 'math'."),
        ({"revoked": True}, "Expert 'math' is not loaded on this server."),
    ],
    ids=["without an agreement", "revoked"],
)
@pytest.mark.parametrize("path", ENDPOINTS)
async def test_nothing_is_answered_without_it(
    client: httpx.AsyncClient, publish: Any, handler: Any, path: str, how: dict[str, bool], why: str
) -> None:
    publish(**how)
    for more in ({}, {"stream": True}, {"flexgate": {"experts": {"only": ["news"]}}}):
        response = await client.post(path, json={**ENDPOINTS[path], **more})
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (503, "required_expert_missing")
        assert why in error["message"]
    assert not handler.seen


@pytest.mark.asyncio
async def test_it_takes_part_in_what_names_others_alone(client: httpx.AsyncClient, publish: Any, handler: Any) -> None:
    publish()
    handler.result = ValueError("no engine")
    await client.post("/v1/completions", json={"prompt": "x", "flexgate": {"experts": {"only": ["news"]}}})
    (call,) = handler.calls
    assert [slot.expert for slot in call.experts] == ["public", "news", "math"]
