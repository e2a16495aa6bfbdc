"""Two server processes on one PostgreSQL, with everything real but the engine."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import free_port
from postgreskit import PostgresServer, find, running

from flexgate.policies.agreements import Agreement
from flexgate.policies.documents import Expert, Role, Tenant
from flexgate.policies.store import Store

pytestmark = pytest.mark.slow

LEASE_S = 2.0
EXPERTS = {"public": "commons", "news": "gazette"}
TERMS = {"owner": "gazette", "experts": ["news"], "assignee": "everyone", "effect": "permit"}
PRESS = "/v1/organization/projects/proj_press/expert_permissions"


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    if find("postgres") is None and not os.environ.get("CI"):
        pytest.skip("PostgreSQL is not installed")
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def urls(postgres: PostgresServer) -> Iterator[tuple[str, ...]]:
    """Two processes with everything real but the engine."""
    database = postgres.new_database()
    seed(database)
    servers = [start(database), start(database)]
    try:
        for url, _ in servers:
            _until(lambda url=url: _status(url, "/ready") == 200, 240)  # type: ignore[misc]
        yield tuple(url for url, _ in servers)
    finally:
        for _, process in servers:
            process.terminate()
        for _, process in servers:
            process.wait(60)


def seed(database: str) -> None:
    """Tenant press may use news, by an agreement that a test may end."""
    store = Store.open(database)
    store.migrate()
    with store.change(actor="test", at=time.time() - 100) as change:
        for id_, owner in EXPERTS.items():
            change.put(Expert(id=id_, owner=owner))
        change.put(Agreement.model_validate({**TERMS, "id": "a-news"}))
        change.put(Tenant(id="proj_press", name="press", expert_ids=frozenset({"news"})))
        change.add_key("sk-test-press", prefix="sk-test-press", role=Role.TENANT, tenant_id="proj_press")
        change.add_key("sk-test-admin", prefix="sk-test-admin", role=Role.ADMIN)
    store.close()


def start(database: str) -> tuple[str, subprocess.Popen[bytes]]:
    """A process and its URL."""
    port = str(free_port())
    command = [sys.executable, str(Path(__file__).with_name("app_process.py")), database, port, *EXPERTS]
    return f"http://127.0.0.1:{port}", subprocess.Popen(command, env={**os.environ, "PYTHONSAFEPATH": "1"})


def _until(condition: Callable[[], bool], seconds: float) -> float:
    """Wait until it holds; returns after how many seconds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not happen in time"
        time.sleep(0.01)
    return time.monotonic() - began


def _status(url: str, path: str) -> int:
    try:
        return httpx.get(url + path).status_code
    except httpx.TransportError:
        return 0


def admin(url: str, method: str, path: str, **body: Any) -> httpx.Response:
    headers = {"authorization": "Bearer sk-test-admin"}
    answer = httpx.request(method, url + path, json=body, headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer


def ask(url: str, only: str = "news") -> tuple[int, str | None]:
    """Status and code of a question of tenant press that needs one expert."""
    body = {"prompt": "x", "max_tokens": 1, "flexgate": {"experts": {"only": [only]}}}
    headers = {"authorization": "Bearer sk-test-press"}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=30)
    if answer.status_code == 200:
        return 200, None
    excluded = answer.json().get("flexgate", {}).get("excluded")
    return answer.status_code, excluded[0]["code"] if excluded else answer.json()["error"]["code"]


def test_a_change_on_one_is_enforced_on_the_other_within_a_second(urls: tuple[str, ...]) -> None:
    waits = []
    for turn in range(20):
        here, there = urls if turn % 2 else urls[::-1]
        admin(here, "POST", PRESS, mode="allow_list", expert_ids=[])
        waits.append(_until(lambda there=there: ask(there)[0] == 403, 5))  # type: ignore[misc]
        admin(here, "POST", PRESS, mode="allow_list", expert_ids=["news"])
        waits.append(_until(lambda there=there: ask(there)[0] == 200, 5))  # type: ignore[misc]
    assert max(waits) <= 1.0, sorted(waits)[-5:]


def test_with_wait_all_the_change_is_everywhere_when_the_answer_comes(urls: tuple[str, ...]) -> None:
    for turn in range(10):
        here, there = urls if turn % 2 else urls[::-1]
        admin(here, "POST", f"{PRESS}?wait=all", mode="allow_list", expert_ids=[])
        assert ask(there) == (403, "not_in_allow_list")
        admin(here, "POST", f"{PRESS}?wait=all", mode="allow_list", expert_ids=["news"])
        assert ask(there)[0] == 200


def test_a_key_revoked_on_one_is_refused_by_the_other(urls: tuple[str, ...]) -> None:
    accounts = "/v1/organization/projects/proj_press/service_accounts"
    made = admin(urls[0], "POST", f"{accounts}?wait=all", name="robot").json()
    headers = {"authorization": f"Bearer {made['api_key']['value']}"}
    assert httpx.get(f"{urls[1]}/v1/models", headers=headers).status_code == 200
    admin(urls[0], "DELETE", f"{accounts}/{made['id']}?wait=all")
    assert httpx.get(f"{urls[1]}/v1/models", headers=headers).status_code == 401


@dataclass
class Asked:
    """One question: when it was sent and answered (Unix seconds), and how."""

    sent: float
    answered: float
    status: int
    code: str | None


def watch(url: str, until: float, *, least: int = 0) -> list[Asked]:
    """Ask again and again, and ``least`` times more after ``until``, however slow the machine is."""
    found: list[Asked] = []
    while (sent := time.time()) < until or sum(a.sent >= until for a in found) < least:
        status, code = ask(url)
        found.append(Asked(sent, time.time(), status, code))
    return found


@pytest.fixture
def ending(urls: tuple[str, ...]) -> Iterator[float]:
    """The agreement about `news` ends in eight seconds, on both servers; it is renewed at the end."""
    end = math.ceil(time.time()) + 8
    when = datetime.fromtimestamp(end, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    admin(urls[0], "POST", "/v1/agreements/a-news?wait=all", **TERMS, not_after=when)
    yield float(end)
    admin(urls[0], "POST", "/v1/agreements/a-news?wait=all", **TERMS)


def test_an_agreement_ends_at_its_second_on_both(urls: tuple[str, ...], ending: float) -> None:
    with ThreadPoolExecutor(2) as pool:
        watched = list(pool.map(lambda url: watch(url, ending, least=11), urls))
    for asked in watched:
        before = [a for a in asked if a.answered < ending]
        after = [a for a in asked if a.sent >= ending]
        assert len(before) > 10
        assert len(after) > 10
        assert {(a.status, a.code) for a in before} == {(200, None)}
        assert {(a.status, a.code) for a in after} == {(403, "agreement_ended")}


def test_cut_off_from_the_database_both_fail_closed_within_their_lease(
    urls: tuple[str, ...], postgres: PostgresServer
) -> None:
    assert [ask(url)[0] for url in urls] == [200, 200]
    postgres.pause()
    try:
        cut = time.time()
        with ThreadPoolExecutor(2) as pool:
            watched = list(pool.map(lambda url: watch(url, cut + 2 * LEASE_S + 1), urls))
    finally:
        postgres.resume()
    for asked in watched:
        late = [a for a in asked if a.sent >= cut + LEASE_S]
        assert late
        assert {(a.status, a.code) for a in late} == {(503, "policy_unavailable")}
        assert max(a.answered - a.sent for a in asked) < LEASE_S + 1
    for url in urls:
        _until(lambda url=url: ask(url)[0] == 200, 10)  # type: ignore[misc]
