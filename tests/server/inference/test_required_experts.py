"""What a server answers where an expert is required: with it, or not at all."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import httpx
import pytest

from flexgate.policies.agreements import Agreement
from flexgate.policies.snapshot import Snapshot
from flexgate.server.experts.revoke import Revocation

ENDPOINTS = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/responses": {"input": "x"},
}


FORMS: list[dict[str, Any]] = [
    {},
    {"stream": True},
    {"flexgate": {"experts": {"only": ["news"]}}},
    {"flexgate": {"explain": "counterfactual"}},
    {"flexgate": {"min_policy_version": 1}},
]
COMPLETIONS: list[dict[str, Any]] = [{"n": 2}, {"prompt": ["x", "y"]}, {"echo": True}, {"n": 2, "stream": True}]
REQUIREMENT = {"id": "r", "owner": "academy", "experts": ["math"], "assignee": "tenant:t", "effect": "require"}
WHO = {"server": "every request to this server uses", "agreement": "agreement 'r' (version 1) requires"}


@pytest.fixture(params=WHO)
def by(request: Any) -> str:
    """What requires the expert."""
    name: str = request.param
    return name


def requiring(snapshot: Snapshot, world: Any, by: str, *, permitted: bool = True, revoked: bool = False) -> Snapshot:
    """A policy by which requests use `math`, which tenant `t` has not on its list."""
    tenants, agreements = world
    requirements = [Agreement.model_validate(REQUIREMENT)] if by == "agreement" else []
    required = "math" if by == "server" else None
    return Snapshot.build(
        policy_version=snapshot.policy_version + 1,
        experts=[e.model_copy(update={"required": e.id == required}) for e in snapshot.experts.values()],
        tenants=tenants,
        agreements=[*requirements, *(terms for terms in agreements if permitted or terms.id != "a-math")],
        keys=snapshot.keys.values(),
        revocation_epochs={"math": 2} if revoked else {},
    )


@pytest.fixture
def publish(store: Any, snapshot: Snapshot, world: Any, services: Any, by: str) -> Any:
    """Let the server learn of such a policy."""

    def publish(**how: bool) -> None:
        store.answer = requiring(snapshot, world, by, **how)
        services.policy.confirm()

    return publish


@pytest.mark.asyncio
@pytest.mark.parametrize("path", ENDPOINTS)
async def test_a_request_that_leaves_it_out_is_refused(
    client: httpx.AsyncClient, publish: Any, by: str, path: str
) -> None:
    publish()
    body = {**ENDPOINTS[path], "flexgate": {"experts": {"ignore": ["math"]}}}
    response = await client.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "expert_required", "flexgate.experts.ignore")
    assert error["message"] == f"'flexgate.experts.ignore' names 'math', which {WHO[by]}. Remove it from there."


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
    for more in (*FORMS, *(COMPLETIONS if path == "/v1/completions" else ())):
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


NARROWER: list[dict[str, Any]] = [
    {"only": []},
    {"only": ["public"]},
    {"only": ["news"]},
    {"only": ["math"]},
    {"ignore": ["news"]},
    {"only": ["news"], "ignore": ["news"]},
    {"only": ["public", "math"], "ignore": ["news"]},
    {"only": [], "ignore": ["math"]},
    {"ignore": ["math", "news"]},
    {"ignore": ["public"]},
]


@pytest.mark.asyncio
@pytest.mark.parametrize("path", ENDPOINTS)
async def test_what_is_optional_can_be_left_out_beside_it_and_it_cannot(
    client: httpx.AsyncClient, publish: Any, handler: Any, path: str
) -> None:
    publish()
    handler.result = ValueError("no engine")
    for experts in NARROWER:
        reached = len(handler.calls)
        await client.post(path, json={**ENDPOINTS[path], "flexgate": {"experts": experts}})
        excused = {"math", "public"} & {*experts.get("ignore", [])}
        assert (len(handler.calls) > reached) == (not excused), experts
    gates = [[ref.expert for ref in call.experts] for call in handler.calls]
    assert all({"public", "math"} <= {*gate} for gate in gates)
    assert ["public", "math"] in gates
    assert ["public", "news", "math"] in gates


@pytest.mark.asyncio
async def test_a_revocation_names_who_is_not_served_any_more(
    make_client: Any, services: Any, publish: Any, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def revoke(expert: str, **_: Any) -> dict[str, Any]:
        publish(revoked=True)
        record = asdict(Revocation(expert, 2, 1, 4, 1.0))
        return {"object": "expert.revocation", **record, "effective_at": 2.0}

    publish()
    monkeypatch.setattr(services.experts, "revoke", revoke)
    async with make_client("sk-admin") as admin:
        revocation = (await admin.delete("/v1/experts/math")).json()
    assert revocation["unserved_projects"] == {"server": {"total": 2, "ids": ["t", "u"]}}.get(
        by, {"total": 1, "ids": ["t"]}
    )
