"""What owners may do to experts, jobs and uploads: their own alone, and what is another's is like what is not there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from flexgate.server.admin.operation import Call
from flexgate.server.experts.changes import open_upload, router
from flexgate.server.experts.revoke import Revocation
from flexgate.server.experts.schemas import AddBody, WriteQuery
from flexgate.server.http.auth import authenticate
from flexgate.server.http.errors import ApiError

pytestmark = pytest.mark.asyncio

ROUTES = [
    ("POST", "/v1/experts", {"package": "news"}),
    ("DELETE", "/v1/experts/news", None),
    ("POST", "/v1/expert_uploads", {"files": {"manifest.json": 1, "weights.safetensors": 1}}),
    ("GET", "/v1/expert_uploads/up_x", None),
    ("PATCH", "/v1/expert_uploads/up_x/manifest.json?offset=0", None),
    ("DELETE", "/v1/expert_uploads/up_x", None),
]
"""What changes experts, with a body that would be read."""


@pytest.fixture
def ask(make_client: Callable[..., httpx.AsyncClient]) -> Callable[..., Any]:
    async def send(key: str, method: str, path: str, body: Any = None) -> httpx.Response:
        async with make_client(key) as http:
            return await http.request(method, path, json=body)

    return send


@pytest.fixture
def revoked(services: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The experts that the service is told to revoke, with the actor."""
    told: list[tuple[str, str]] = []

    async def revoke(expert: str, *, actor: str, drain_seconds: float = 0.0) -> dict[str, Any]:
        told.append((expert, actor))
        return {"object": "expert.revocation", **asdict(Revocation(expert, 1, 1, 4, 1.0)), "effective_at": 2.0}

    monkeypatch.setattr(services.experts, "revoke", revoke)
    return told


@pytest.mark.parametrize(("method", "path", "body"), ROUTES, ids=[f"{m} {p.partition('?')[0]}" for m, p, _ in ROUTES])
@pytest.mark.parametrize("key", ["sk-t", "sk-auditor"])
async def test_only_administrators_and_owners_change_experts(
    ask: Any, revoked: list[Any], key: str, method: str, path: str, body: Any
) -> None:
    answer = await ask(key, method, path, body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "wrong_key_role")
    assert revoked == []


@pytest.mark.parametrize("stream", ["", "?stream=true"])
async def test_an_owner_reads_its_own_jobs_and_another_is_like_none(ask: Any, services: Any, stream: str) -> None:
    mine = services.experts.jobs.open("mine", "an_earlier_key", "owner gazette")
    theirs = services.experts.jobs.open("theirs", "key_sk-owner", "owner other")
    for job in (mine, theirs):
        await job.fail("package_refused", "no", 1.0)
    assert (await ask("sk-owner", "GET", f"/v1/expert_jobs/{mine.id}{stream}")).status_code == 200
    refused = await ask("sk-owner", "GET", f"/v1/expert_jobs/{theirs.id}{stream}")
    absent = await ask("sk-owner", "GET", f"/v1/expert_jobs/job_0{stream}")
    assert refused.status_code == 404
    assert refused.content == absent.content
    for key, status in (("sk-admin", 200), ("sk-auditor", 200), ("sk-t", 403)):
        assert (await ask(key, "GET", f"/v1/expert_jobs/{theirs.id}{stream}")).status_code == status


async def test_an_owner_revokes_its_own_experts_and_another_is_like_none(ask: Any, revoked: list[Any]) -> None:
    answers = [await ask("sk-owner", "DELETE", f"/v1/experts/{expert}") for expert in ("math", "secret", "nonsense")]
    assert [answer.status_code for answer in answers] == [404, 404, 404]
    assert len({answer.content for answer in answers}) == 1
    assert revoked == []
    by_owner = await ask("sk-owner", "DELETE", "/v1/experts/news")
    by_admin = await ask("sk-admin", "DELETE", "/v1/experts/math")
    assert (by_owner.status_code, by_admin.status_code) == (200, 200)
    assert by_owner.json()["unserved_projects"] is None, "an owner learns of no project"
    assert by_admin.json()["unserved_projects"] == {"total": 0, "ids": []}
    assert revoked == [("news", "key_sk-owner"), ("math", "key_sk-admin")]


async def test_the_operations_themselves_refuse_a_key_that_passed_the_check_of_roles(
    services: Any, revoked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands behind the roles of the table, without it: a tenant's key reaches nothing of others."""
    (tmp_path / "packages" / "news").mkdir(parents=True)
    services.experts_dir = tmp_path / "packages"
    monkeypatch.setattr(services.experts, "start_add", lambda *_, **__: pytest.fail("it was added"))
    theirs = services.experts.jobs.open("theirs", "key_of_another_owner", "owner other")
    upload = services.uploads.open("owner other", {"manifest.json": 1, "expert.safetensors": 1})
    snapshot = services.policy.stored
    principal = authenticate(snapshot, "Bearer sk-t", 2.0)
    path = {"expert": "news", "job": theirs.id, "upload": upload.id, "file": "manifest.json"}
    given: dict[Any, Any] = {AddBody: AddBody(package="news"), WriteQuery: WriteQuery(offset=0)}
    refused = {}
    for operation in (route.operation for route in router.declared()):
        if operation.work is open_upload:
            continue  # makes something of the caller's own, and reads nothing
        body, query = (given.get(kind) or kind() for kind in (operation.body, operation.query))
        call = Call(services, principal, snapshot, path, query, body, 2.0, Request({"type": "http"}))
        with pytest.raises(ApiError) as caught:
            await (operation.work(call) if operation.on_loop else asyncio.to_thread(operation.work, call))
        refused[operation.method, operation.path] = caught.value.code
    assert refused == {
        ("POST", "/v1/experts"): "upload_required",
        ("DELETE", "/v1/experts/{expert}"): "expert_not_found",
        ("GET", "/v1/expert_jobs/{job}"): "job_not_found",
        ("GET", "/v1/expert_uploads/{upload}"): "upload_not_found",
        ("DELETE", "/v1/expert_uploads/{upload}"): "upload_not_found",
        ("PATCH", "/v1/expert_uploads/{upload}/{file}"): "upload_not_found",
    }
    assert revoked == []


async def test_an_owner_adds_no_package_of_the_servers_folder(
    ask: Any, services: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "packages" / "news").mkdir(parents=True)
    services.experts_dir = tmp_path / "packages"
    begun: list[Any] = []

    def start_add(source: Path, **more: Any) -> Any:
        begun.append((source.name, more["owner"]))
        return services.experts.jobs.open(source.name, more["actor"], more["limited_with"])

    monkeypatch.setattr(services.experts, "start_add", start_add)
    answers = [await ask("sk-owner", "POST", "/v1/experts", {"package": name}) for name in ("news", "nonsense")]
    assert [answer.json()["error"]["code"] for answer in answers] == ["upload_required"] * 2
    assert answers[0].content == answers[1].content
    assert begun == []
    assert (await ask("sk-admin", "POST", "/v1/experts", {"package": "news"})).status_code == 202
    assert begun == [("news", None)]


async def test_what_an_owner_uploads_is_added_as_a_package_of_that_owner_alone(
    ask: Any, services: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []

    def start_add(source: Path, **more: Any) -> Any:
        begun.append(more["owner"])
        return services.experts.jobs.open(source.name, more["actor"], more["limited_with"])

    monkeypatch.setattr(services.experts, "start_add", start_add)
    monkeypatch.setattr(services.uploads, "get", lambda id_, actor: (id_, actor))
    monkeypatch.setattr(services.uploads, "take", lambda upload: tmp_path)
    assert (await ask("sk-owner", "POST", "/v1/experts", {"upload": "up_x"})).status_code == 202
    assert begun == ["gazette"]
