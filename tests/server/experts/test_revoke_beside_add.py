"""Revocations while experts are being added: neither waits for the other, and what was revoked stays away."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from slotkit.local import Local, package, zeros

from flexgate.experts.package.verify import open_package
from flexgate.policies.errors import ChangeRefused
from flexgate.server.experts import add as adding
from flexgate.server.experts.errors import ChangeConflict

pytestmark = pytest.mark.asyncio


async def test_packages_that_are_checked_for_long_hold_up_no_thread_of_the_policy(
    here: Local, tmp_path: Path, anchor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checking = threading.Event()

    def long(*args: Any, **kwargs: Any) -> Any:
        checking.wait(30)
        return open_package(*args, **kwargs)

    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    monkeypatch.setattr(adding, "open_package", long)
    jobs = [asyncio.ensure_future(here.add(package(tmp_path, anchor, expert=expert))) for expert in ("a", "b", "c")]
    record = await asyncio.wait_for(here.service.revoke("news", actor="key_owner"), 10)
    assert record["expert"] == "news"
    checking.set()
    assert [job.state for job in await asyncio.gather(*jobs)] == ["succeeded"] * 3


async def test_a_revocation_does_not_wait_until_another_expert_is_loaded(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    here.slots.hold = asyncio.Event()
    adding = asyncio.ensure_future(here.add(package(tmp_path, anchor)))
    while not here.slots.held:
        await asyncio.sleep(0.001)
    record = await asyncio.wait_for(here.service.revoke("news", actor="key_admin"), 5)
    assert record["weights_epoch"] == 2
    here.slots.hold.set()
    job = await adding
    assert job.state == "succeeded"
    assert job.result["slot_epoch"] == 3
    assert here.client.published[-1] == ("public", "math")


async def being_tried(here: Local, source: Path) -> tuple[asyncio.Future[Any], asyncio.Event]:
    """An addition whose canary has begun, into slot 2, and what lets it go on."""
    here.canary_hold = asyncio.Event()
    adding = asyncio.ensure_future(here.add(source))
    while 2 not in here.slots.table.live:
        await asyncio.sleep(0.001)
    return adding, here.canary_hold


async def test_a_revocation_does_not_wait_until_another_expert_is_tried(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    adding, go = await being_tried(here, package(tmp_path, anchor))
    assert here.slots.table.live[2] == 2
    record = await asyncio.wait_for(here.service.revoke("news", actor="key_admin"), 5)
    assert record["weights_epoch"] == 2
    go.set()
    job = await adding
    assert job.result["slot_epoch"] == 3
    assert here.slots.table.live == {0: 1, 2: 3}
    assert here.client.experts()[1].slot_epoch == 3


async def test_what_was_revoked_while_a_package_of_it_was_on_its_way_stays_away(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    await here.add(package(tmp_path, anchor))
    here.slots.hold = asyncio.Event()
    replacing = asyncio.ensure_future(here.add(package(tmp_path, anchor, version=2)))
    while not here.slots.held:
        await asyncio.sleep(0.001)
    await here.service.revoke("math", actor="key_owner")
    here.slots.hold.set()
    assert (await replacing).error == {
        "code": "experts_changing",
        "message": "Expert 'math' was revoked while this package was being added. To serve it anyway, add the "
        "package again.",
    }
    assert here.client.published[-1] == ("public", "news")
    assert here.store.weights().revoked == {"math"}
    assert here.slots.digests(2) == here.slots.digests(3) == zeros(here)
    assert (await here.add(package(tmp_path, anchor, version=2))).state == "succeeded"


async def test_a_slot_is_nobodys_while_a_revocation_of_its_expert_is_being_committed(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    committing, go = threading.Event(), threading.Event()

    def refused(*_: object, **__: object) -> int:
        committing.set()
        go.wait(30)
        raise ChangeRefused("not so")

    here.service._pool.repository.revoke = refused  # type: ignore[method-assign]
    before = here.slots.digests(1)
    revoking = asyncio.ensure_future(here.service.revoke("news", actor="key_owner"))
    await asyncio.to_thread(committing.wait, 30)
    assert [info.id for info in here.client.experts() if info.live] == ["public"]
    adding = asyncio.ensure_future(here.add(package(tmp_path, anchor)))
    while len(here.slots.table.live) < 3 and not adding.done():
        await asyncio.sleep(0.001)
    go.set()
    with pytest.raises(ChangeConflict, match="The store refused"):
        await revoking
    assert (await adding).result["slot"] == 2
    assert here.slots.table.live == {0: 1, 1: 1, 2: 2}
    assert here.slots.digests(1) == before
    assert [info.id for info in here.client.experts() if info.live] == ["public", "news", "math"]


async def test_an_expert_that_is_being_revoked_is_not_replaced(here: Local, tmp_path: Path, anchor: Path) -> None:
    await here.add(package(tmp_path, anchor))
    here.slots.busy = {2}
    draining = asyncio.ensure_future(here.service.revoke("math", actor="key_owner", drain_seconds=60.0))
    await asyncio.sleep(0.05)
    assert (await here.add(package(tmp_path, anchor, version=2))).error == {
        "code": "experts_changing",
        "message": "Expert 'math' is being revoked. Add it again once that is done.",
    }
    here.slots.busy = set()
    assert (await draining)["expert"] == "math"
    assert (await here.add(package(tmp_path, anchor, version=2))).state == "succeeded"


async def test_an_expert_that_is_being_added_for_the_first_time_cannot_be_revoked_yet(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    here.slots.hold = asyncio.Event()
    adding = asyncio.ensure_future(here.add(package(tmp_path, anchor)))
    while not here.slots.held:
        await asyncio.sleep(0.001)
    with pytest.raises(ChangeConflict, match=r"being added\. Revoke it once its job has ended") as refused:
        await here.service.revoke("math", actor="key_owner")
    assert refused.value.code == "experts_changing"
    here.slots.hold.set()
    assert (await adding).state == "succeeded"
    assert (await here.service.revoke("math", actor="key_owner"))["expert"] == "math"


async def test_a_version_that_was_committed_as_a_drain_began_is_given_to_nobody(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    await here.add(package(tmp_path, anchor))
    here.slots.busy = {2}
    confirming, go = threading.Event(), threading.Event()

    def confirm() -> None:
        confirming.set()
        go.wait(30)

    here.service._loader._confirm = confirm
    replacing = asyncio.ensure_future(here.add(package(tmp_path, anchor, version=2)))
    await asyncio.to_thread(confirming.wait, 30)
    draining = asyncio.ensure_future(here.service.revoke("math", actor="key_owner", drain_seconds=60.0))
    await asyncio.sleep(0.05)
    go.set()
    assert (await replacing).state == "succeeded"
    assert [info.id for info in here.client.experts() if info.live] == ["public", "news"]
    here.slots.busy = set()
    assert (await draining)["expert"] == "math"
    assert here.client.published[-1] == ("public", "news")
    assert here.slots.digests(2) == here.slots.digests(3) == zeros(here)


async def test_an_engine_that_does_not_open_a_slot_anew_fails_the_job_and_keeps_nothing(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    adding, go = await being_tried(here, package(tmp_path, anchor))
    await here.service.revoke("news", actor="key_admin")
    here.slots.fails["open"] = 1
    go.set()
    job = await adding
    assert job.error["code"] == "engine_failed"
    assert here.slots.table.live == {0: 1}
    assert here.slots.digests(2) == zeros(here)
