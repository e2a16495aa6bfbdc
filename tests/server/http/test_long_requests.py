"""Requests that take long do not outlive their key: slow bodies, uploads, streams of jobs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import httpx
import pytest

from flexgate.policies.snapshot import Snapshot

pytestmark = pytest.mark.asyncio

TERMS = {"experts": ["news"], "assignee": "everyone", "effect": "permit"}
FILES = {"manifest.json": 10, "expert.safetensors": 10}
SLOW = {
    "completion": ("sk-t", "POST", "/v1/completions", {"prompt": "x"}),
    "chat": ("sk-t", "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    "tokens": ("sk-t", "POST", "/tokenize", {"prompt": "x"}),
    "administration": ("sk-admin", "POST", "/v1/organization/projects", {"name": "made with a revoked key"}),
    "agreement": (
        "sk-owner",
        "POST",
        "/v1/agreements",
        {"experts": ["news"], "assignee": "everyone", "effect": "permit"},
    ),
    "addition": ("sk-owner", "POST", "/v1/experts", {"upload": "up_x"}),
    "announcement": (
        "sk-owner",
        "POST",
        "/v1/expert_uploads",
        {"files": FILES},
    ),
}


def without(snapshot: Snapshot, secret: str) -> Snapshot:
    keys = {digest: replace(key, revoked=1.0) if key.prefix == secret else key for digest, key in snapshot.keys.items()}
    return replace(snapshot, policy_version=snapshot.policy_version + 1, keys=MappingProxyType(keys))


@pytest.fixture
def revoke(services: Any, store: Any, snapshot: Snapshot) -> Callable[[str], None]:
    """Revokes a key as another process would."""

    def now(secret: str) -> None:
        store.answer = without(snapshot, secret)
        services.policy.confirm()

    return now


@pytest.mark.parametrize("slow", SLOW)
async def test_a_body_that_comes_slowly_does_nothing_with_a_key_that_was_revoked_meanwhile(
    make_client: Callable[..., httpx.AsyncClient],
    services: Any,
    handler: Any,
    real_store: Any,
    revoke: Callable[[str], None],
    slow: str,
) -> None:
    key, method, path, body = SLOW[slow]
    before = real_store.version()

    async def content() -> AsyncIterator[bytes]:
        data = json.dumps(body).encode()
        yield data[:5]
        revoke(key)
        yield data[5:]

    async with make_client(key) as http:
        headers = {"content-type": "application/json"}
        answer = await http.request(method, path, content=content(), headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert (handler.seen, real_store.version()) == ([], before)


async def test_an_upload_ends_with_its_key_though_its_client_is_silent(
    make_client: Callable[..., httpx.AsyncClient], services: Any, revoke: Callable[[str], None]
) -> None:
    upload = services.uploads.open("owner gazette", FILES)

    async def content() -> AsyncIterator[bytes]:
        yield b"12345"
        revoke("sk-owner")
        await asyncio.Event().wait()

    async with make_client("sk-owner") as http, asyncio.timeout(10):
        answer = await http.patch(f"/v1/expert_uploads/{upload.id}/manifest.json?offset=0", content=content())
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert upload.received("manifest.json") in (0, 5)
    services.uploads.remove(upload)  # nothing writes to it any more


@pytest.mark.parametrize("key", ["sk-owner", "sk-admin", "sk-auditor"])
async def test_a_stream_of_a_job_ends_with_its_key(
    make_client: Callable[..., httpx.AsyncClient], services: Any, revoke: Callable[[str], None], key: str
) -> None:
    job = services.experts.jobs.open("package", f"key_{key}", "owner gazette" if key == "sk-owner" else f"key_{key}")
    async with make_client(key) as http, asyncio.timeout(10):
        asking = asyncio.create_task(http.get(f"/v1/expert_jobs/{job.id}?stream=true"))
        while not job._changed._waiters:  # type: ignore[attr-defined]
            await asyncio.sleep(0.001)
        revoke(key)
        answer = await asking
    first, error, done = [line[6:] for line in answer.text.splitlines() if line]
    assert json.loads(first)["status"] == "running"
    assert json.loads(error)["error"]["code"] == "invalid_api_key"
    assert done == "[DONE]"
    assert not job._changed._waiters  # type: ignore[attr-defined]
