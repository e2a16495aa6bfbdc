"""Who waits for whom: changes never wait for what tenants and owners read, however much of it there is."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexgate.policies.documents import Role
from flexgate.policies.store import Store, accounts
from flexgate.policies.store.agreements import list_agreements
from flexgate.server.admin.agreements import endpoints as agreements
from flexgate.server.admin.concurrency_limit import AT_ONCE_OF_ONE, MOST_OF_ONE, MOST_SUMS_OF_ONE
from flexgate.server.admin.operations import OPERATIONS
from flexgate.server.admin.projects import endpoints as projects
from flexgate.server.admin.usage import endpoints as usage
from flexgate.server.experts import uploads
from flexgate.server.experts.changes import MOST_JOBS
from flexgate.server.policy.executors import OTHERS_CHANGES, OTHERS_READS

pytestmark = pytest.mark.asyncio
UPLOADS = "/v1/expert_uploads"
USAGE = "/v1/organization/usage/completions?start_time=0&end_time=1"
READS = {"sk-t": "/v1/organization/projects/t", "sk-owner": "/v1/agreements"}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """What tenants and owners read takes until this is set."""
    done = threading.Event()

    def wait(inner: Any) -> Any:
        return lambda *arguments, **more: done.wait(20) and inner(*arguments, **more)

    monkeypatch.setattr(usage, "sums", wait(usage.sums))
    monkeypatch.setattr(projects, "visible_project", wait(projects.visible_project))
    monkeypatch.setattr(agreements.agreements, "list_agreements", wait(agreements.agreements.list_agreements))
    yield done
    done.set()


async def test_a_key_is_revoked_while_tenants_and_owners_read_without_end(
    call: Any, real_store: Store, slow: threading.Event
) -> None:
    (key,) = [key.key_id for key in real_store.keys() if key.prefix == "sk-u"]
    asked = [pair for pair in READS.items() for _ in range(MOST_OF_ONE + 8)]
    reads = [asyncio.ensure_future(call(who, "GET", path)) for who, path in asked]
    await asyncio.sleep(0.1)
    async with asyncio.timeout(10):
        revoked = await call("sk-admin", "DELETE", f"/v1/organization/projects/u/api_keys/{key}")
        ended = await call("sk-owner", "DELETE", "/v1/agreements/a-news")
    assert (revoked.status_code, ended.status_code) == (200, 200)
    slow.set()
    found = Counter(
        (answer.request.headers["authorization"], answer.status_code) for answer in await asyncio.gather(*reads)
    )
    assert {status for _, status in found} == {200, 429}
    for who in READS:
        assert found[f"Bearer {who}", 200] == MOST_OF_ONE


async def test_too_many_at_once_are_refused_in_words(call: Any, slow: threading.Event) -> None:
    reads = [asyncio.ensure_future(call("sk-t", "GET", READS["sk-t"])) for _ in range(MOST_OF_ONE + 1)]
    (refused,), _ = await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
    answer = refused.result()
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.json() == {
        "error": {
            "message": "64 such administration requests of this project or owner are in progress, which is the limit. "
            "Try again when one has finished.",
            "type": "requests",
            "param": None,
            "code": "rate_limit_exceeded",
        }
    }
    slow.set()
    assert Counter(answer.status_code for answer in await asyncio.gather(*reads)) == {200: MOST_OF_ONE, 429: 1}


async def test_the_keys_of_a_project_share_its_bound(
    call: Any, services: Any, real_store: Store, slow: threading.Event
) -> None:
    second = accounts.create_service_account(real_store, "t", "second", actor="test", at=2.0)[1].secret
    services.policy.confirm()
    keys = ["sk-t", second] * MOST_OF_ONE
    reads = [asyncio.ensure_future(call(key, "GET", READS["sk-t"])) for key in keys]
    done, _ = await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
    assert done
    slow.set()
    assert Counter(answer.status_code for answer in await asyncio.gather(*reads)) == {
        200: MOST_OF_ONE,
        429: MOST_OF_ONE,
    }


async def test_what_waits_of_a_project_is_in_no_thread_and_answered_in_its_turn(
    call: Any, slow: threading.Event
) -> None:
    reads = [asyncio.ensure_future(call("sk-t", "GET", READS["sk-t"])) for _ in range(MOST_OF_ONE)]
    await asyncio.sleep(0.1)
    assert OTHERS_READS._work_queue.qsize() <= AT_ONCE_OF_ONE
    slow.set()
    assert {answer.status_code for answer in await asyncio.gather(*reads)} == {200}


async def test_operators_may_have_as_much_under_way_as_they_like(call: Any, slow: threading.Event) -> None:
    reads = [asyncio.ensure_future(call("sk-admin", "GET", READS["sk-t"])) for _ in range(3 * MOST_OF_ONE)]
    await asyncio.sleep(0.05)
    slow.set()
    assert {answer.status_code for answer in await asyncio.gather(*reads)} == {200}


async def test_a_key_is_revoked_while_everybody_else_reads_and_changes_without_end(
    call: Any, real_store: Store, slow: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(inner: Any) -> Any:
        return lambda *arguments, **more: slow.wait(20) and inner(*arguments, **more)

    monkeypatch.setattr(agreements.agreements, "terminate_agreement", wait(agreements.agreements.terminate_agreement))
    (key,) = [key.key_id for key in real_store.keys() if key.prefix == "sk-u"]
    threads = [asyncio.create_task(asyncio.to_thread(slow.wait, 20)) for _ in range(64)]
    reads = [asyncio.create_task(call("sk-auditor", "GET", READS["sk-t"])) for _ in range(30)]
    changes = [asyncio.create_task(call("sk-owner", "DELETE", "/v1/agreements/a-news")) for _ in range(MOST_OF_ONE)]
    await asyncio.sleep(0.1)
    async with asyncio.timeout(10):
        revoked = await call("sk-admin", "DELETE", f"/v1/organization/projects/u/api_keys/{key}")
    assert revoked.status_code == 200
    assert not any(task.done() for task in (*threads, *reads, *changes))
    slow.set()
    await asyncio.gather(*threads, *reads, *changes)


async def test_a_key_that_is_revoked_while_its_change_waits_for_a_thread_changes_nothing(
    call: Any, real_store: Store, slow: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminate, begun = agreements.agreements.terminate_agreement, []

    def wait(*arguments: Any, **more: Any) -> Any:
        begun.append(arguments)
        return slow.wait(20) and terminate(*arguments, **more)

    monkeypatch.setattr(agreements.agreements, "terminate_agreement", wait)
    (owner,) = [key.key_id for key in real_store.keys() if key.prefix == "sk-owner"]
    changes = [asyncio.create_task(call("sk-owner", "DELETE", "/v1/agreements/nonsense")) for _ in range(2)]
    async with asyncio.timeout(10):
        while len(begun) < 2:
            await asyncio.sleep(0.001)
        changes.append(asyncio.create_task(call("sk-owner", "DELETE", "/v1/agreements/a-news")))
        while not OTHERS_CHANGES._work_queue.qsize():
            await asyncio.sleep(0.001)
        assert (await call("sk-admin", "DELETE", f"/v1/organization/admin_api_keys/{owner}")).status_code == 200
    slow.set()
    assert [answer.status_code for answer in await asyncio.gather(*changes)] == [404, 404, 401]
    assert "a-news" in {agreement.id for agreement in list_agreements(real_store)}


async def test_sums_over_the_ledger_hold_up_no_other_reads_and_no_other_keys_sums(
    call: Any, slow: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = usage.sums
    asked = [asyncio.create_task(call("sk-admin", "GET", USAGE)) for _ in range(MOST_SUMS_OF_ONE + 4)]
    async with asyncio.timeout(10):
        while sum(task.done() for task in asked) < 4:
            await asyncio.sleep(0.001)
        refused = [task.result() for task in asked if task.done()]
        assert {(answer.status_code, answer.json()["error"]["code"]) for answer in refused} == {
            (429, "rate_limit_exceeded")
        }
        assert "8 such administration requests of this key" in refused[0].json()["error"]["message"]
        assert (await call("sk-admin", "GET", "/v1/organization/admin_api_keys")).status_code == 200
        monkeypatch.setattr(usage, "sums", lambda *_: [])
        assert (await call("sk-auditor", "GET", USAGE)).status_code == 200
        monkeypatch.setattr(usage, "sums", waiting)
    slow.set()
    assert Counter(answer.status_code for answer in await asyncio.gather(*asked)) == {200: MOST_SUMS_OF_ONE, 429: 4}


async def test_only_what_waits_for_the_engine_or_a_client_is_done_on_the_event_loop() -> None:
    assert {(operation.method, operation.path) for operation in OPERATIONS if operation.on_loop} == {
        ("POST", "/v1/experts"),
        ("DELETE", "/v1/experts/{expert}"),
        ("GET", "/v1/expert_jobs/{job}"),
        ("PATCH", "/v1/expert_uploads/{upload}/{file}"),
    }


async def test_large_uploads_are_removed_while_everybody_else_is_answered(
    call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    removing = threading.Event()
    monkeypatch.setattr(uploads.shutil, "rmtree", lambda *_, **__: removing.wait(5))
    files = {"manifest.json": 1, "expert.safetensors": 1}
    opened = [(await call("sk-owner", "POST", UPLOADS, json={"files": files})).json()["id"] for _ in range(4)]
    removed = [asyncio.create_task(call("sk-owner", "DELETE", f"{UPLOADS}/{id_}")) for id_ in opened[:3]]
    try:
        async with asyncio.timeout(4):
            while (await call("sk-owner", "GET", f"{UPLOADS}/{opened[0]}")).status_code == 200:
                await asyncio.sleep(0.001)
            assert (await call("sk-owner", "GET", f"{UPLOADS}/{opened[3]}")).status_code == 200
        assert not any(task.done() for task in removed)
    finally:
        removing.set()
    assert [task.status_code for task in await asyncio.gather(*removed)] == [200] * 3


async def test_the_keys_of_an_owner_share_its_jobs_and_uploads_and_their_bounds(
    call: Any, services: Any, real_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = accounts.create_admin_key(
        real_store, "second", role=Role.OWNER, owner_id="gazette", actor="test", at=2.0
    ).secret
    services.policy.confirm()
    files = {"files": {"manifest.json": 1, "expert.safetensors": 1}}
    opened = [await call(key, "POST", UPLOADS, json=files) for key in ("sk-owner", second) * 2]
    for key in ("sk-owner", second):
        refused = await call(key, "POST", UPLOADS, json=files)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "too_many_uploads")
        for answer in opened:
            assert (await call(key, "GET", f"{UPLOADS}/{answer.json()['id']}")).status_code == 200
    assert (await call("sk-admin", "POST", UPLOADS, json=files)).status_code == 201

    for _ in range(MOST_JOBS):
        services.experts.jobs.open("news", "key_sk-owner", "owner gazette")
    monkeypatch.setattr(services.uploads, "get", lambda id_, caller: (id_, caller))
    monkeypatch.setattr(services.uploads, "take", lambda upload: tmp_path)
    refused = await call(second, "POST", "/v1/experts", json={"upload": "up_x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "too_many_jobs")
