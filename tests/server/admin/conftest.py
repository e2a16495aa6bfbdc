"""The application over a real store, and OpenAI's own admin client driving it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from closingkit import DECEMBER, NEWS, PAID, START

from flexgate.policies.store import Store
from flexgate.policies.store.agreements import revise_agreement
from flexgate.server.ledger.entries import COMPLETED, Registration, Used
from flexgate.server.policy.replicas import Replicas
from flexgate.server.policy.source import PolicySource

EXPERTS = ("public", "news", "math", "secret")


@pytest.fixture
def services(services: Any, real_store: Store) -> Any:
    """Decisions come from the store that the administration writes to."""
    replicas = Replicas(real_store.engine, lease_s=2.0)
    services.policy = PolicySource(
        real_store, lambda: dict.fromkeys(EXPERTS, 1), lease_s=2.0, poll_s=0.01, replicas=replicas
    )
    services.policy.confirm()
    return services


@pytest.fixture
def call(make_client: Callable[..., httpx.AsyncClient]) -> Callable[..., Any]:
    """`await call(key, method, path, json=…)`."""

    async def send(key: str | None, method: str, path: str, **more: Any) -> httpx.Response:
        async with make_client(key) as http:
            return await http.request(method, path, **more)

    return send


@pytest_asyncio.fixture
async def admin(make_client: Callable[..., httpx.AsyncClient]) -> AsyncIterator[Any]:
    """OpenAI's organization client, with the admin key."""
    async with make_client("sk-admin") as http:
        client = openai.AsyncOpenAI(
            base_url="http://test/v1", api_key="none", admin_api_key="sk-admin", http_client=http, max_retries=0
        )
        yield client.admin.organization


@pytest_asyncio.fixture
async def clock_of(services: Any, real_store: Store) -> list[float]:
    """Three requests of November, which are worth 0.38 EUR together; what time it is then can be set."""
    terms = {"experts": ["news"], "assignee": "everyone", "effect": "permit", "duties": PAID}
    revise_agreement(real_store, "a-news", terms, actor="test", at=START + 5)
    now = [START + 60]
    services.ledger._clock = services.clock = lambda: now[0]
    for number in (1, 2, 3):
        made = Registration(f"dec_{number:032x}", 1, "t", "k", "/v1/x", "tiny", 1, 1, (NEWS,))
        services.ledger.register(made).end(COMPLETED, Used(10, 4, 2, [30, 10], [0] * 2))
    await services.ledger.register(Registration("end", 1 << 60, "t", "k", "/v1/x", "tiny", 1, 1, ())).registered()
    while not services.ledger.has_written(DECEMBER):
        await asyncio.sleep(0.001)
    now[0] = DECEMBER + 60
    return now
