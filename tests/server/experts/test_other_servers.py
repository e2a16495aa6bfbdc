"""Several servers on one store: what one revokes, the others unload, whatever was added since."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from slotkit.local import Local, local, package, revoked_in, zeros

from flexgate.policies.errors import StoreUnavailable
from flexgate.policies.ids import ExpertId
from flexgate.server.policy.source import PolicySource

pytestmark = pytest.mark.asyncio


async def test_what_another_process_revokes_is_unloaded_here_too(here: Local, tmp_path: Path, anchor: Path) -> None:
    await here.add(package(tmp_path, anchor))
    following = asyncio.ensure_future(here.service.follow(revoked_in(here.store)))
    elsewhere = here.service._pool.repository
    await asyncio.to_thread(elsewhere.revoke, "math", 2, actor="key_else", at=5.0)
    for _ in range(300):
        if here.client.published[-1] == ("public", "news") and here.slots.digests(2) == zeros(here):
            break
        await asyncio.sleep(0.01)
    following.cancel()
    assert here.client.published[-1] == ("public", "news")
    assert here.slots.digests(2) == zeros(here)
    assert not here.store.snapshot().experts["math"].live  # type: ignore[index]


async def test_what_was_revoked_elsewhere_and_added_there_again_is_unloaded_here(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    source = PolicySource(here.store, lambda: {i.id: i.slot_epoch for i in here.client.experts()}, lease_s=9, poll_s=9)
    assert source.confirm().experts[ExpertId("news")].live
    other = local(here.store, anchor, tmp_path / "other")
    await other.service.revoke("news", actor="key_else")
    assert (await other.add(package(tmp_path, anchor, expert="news", owner="gazette", version=2))).state == "succeeded"
    assert here.store.snapshot().experts[ExpertId("news")].live
    assert not source.confirm().experts[ExpertId("news")].live
    following = asyncio.ensure_future(here.service.follow(source.revoked))
    async with asyncio.timeout(10):
        while here.client.published[-1] != ("public",) or here.slots.digests(1) != zeros(here):
            await asyncio.sleep(0.01)
    following.cancel()


async def test_what_another_server_revoked_is_replaced_only_once_it_is_unloaded(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    path = package(tmp_path, anchor, expert="news", owner="gazette", version=2)
    await local(here.store, anchor, tmp_path / "other").service.revoke("news", actor="key_else")
    assert (await here.add(path)).error == {
        "code": "experts_changing",
        "message": "Expert 'news' was revoked by another server and is being unloaded here. Try again in a moment.",
    }
    following = asyncio.ensure_future(here.service.follow(revoked_in(here.store)))
    async with asyncio.timeout(10):
        while here.client.published[-1] != ("public",) or here.service._pool.changing.locked():
            await asyncio.sleep(0.01)
    following.cancel()
    assert (await here.add(path)).state == "succeeded"


async def test_following_another_process_outlives_a_store_that_fails(here: Local, tmp_path: Path, anchor: Path) -> None:
    await here.add(package(tmp_path, anchor))
    repository = here.service._pool.repository
    await asyncio.to_thread(repository.revoke, "math", 2, actor="key_else", at=5.0)
    asked = repository.revocation_epochs
    failures = [StoreUnavailable("away")]

    def failing() -> dict[str, int]:
        if failures:
            raise failures.pop()
        return asked()

    repository.revocation_epochs = failing  # type: ignore[method-assign]
    following = asyncio.ensure_future(here.service.follow(lambda expert, _: expert == "math"))
    for _ in range(400):
        if here.client.published[-1] == ("public", "news") and here.slots.digests(2) == zeros(here):
            break
        await asyncio.sleep(0.01)
    following.cancel()
    assert not failures
    assert here.slots.digests(2) == zeros(here)
