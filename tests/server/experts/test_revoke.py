"""Revoking experts: gone at once, cleared once their users have ended, and recorded."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from slotkit.local import Local, package, zeros

from flexgate.policies.documents import Expert, Tenant
from flexgate.policies.errors import StoreUnavailable
from flexgate.policies.ids import TenantId
from flexgate.server.engine.frontend.calls import ExpertSlotRef, GatedCall
from flexgate.server.engine.protocol.endings import EXPERT_REVOKED
from flexgate.server.experts.errors import ChangeConflict, NotLoaded, NotStored

pytestmark = pytest.mark.asyncio


async def test_a_revoked_expert_is_gone_from_slot_disk_and_catalogue(here: Local, tmp_path: Path, anchor: Path) -> None:
    await here.add(package(tmp_path, anchor))
    record = await here.service.revoke("math", actor="key_admin")
    assert record["digests"] == here.slots.digests(2) == zeros(here)
    assert record["weights_epoch"] == 3
    assert here.client.published[-1] == ("public", "news")
    await asyncio.gather(*here.service._pool._removing)
    assert not list((tmp_path / "experts").iterdir())
    assert not here.store.snapshot().experts["math"].live  # type: ignore[index]
    assert here.store.weights().revoked == {"math"}
    assert [action for _, action, _ in here.recorded] == ["weights.cleared"]


async def test_a_revocation_does_not_wait_until_the_disk_has_removed_large_copies(
    here: Local, tmp_path: Path, anchor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed, threads = threading.Event(), []

    def slow(_path: Path, **_: Any) -> None:
        threads.append(threading.current_thread().name)
        removed.wait(20)

    await here.add(package(tmp_path, anchor))
    await here.add(package(tmp_path, anchor, expert="code"))
    monkeypatch.setattr("flexgate.server.experts.slot_pool.shutil.rmtree", slow)
    try:
        async with asyncio.timeout(10):
            for expert in ("math", "code"):
                await here.service.revoke(expert, actor="key_admin")
        assert not here.service._pool.changing.locked()
    finally:
        removed.set()
    await asyncio.gather(*here.service._pool._removing)
    assert {name.partition("_")[0] for name in threads} == {"removals"}


async def test_an_expert_is_gone_at_once_though_the_store_cannot_be_told_and_stored_once_it_can(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    await here.add(package(tmp_path, anchor))
    call = GatedCall("t", (ExpertSlotRef("math", 2, 2),), float("inf"))
    call.ended.set()
    here.client.open.append(call)
    here.store.engine.dispose()
    (tmp_path / "policy.db").rename(tmp_path / "away.db")
    (tmp_path / "policy.db").mkdir()
    with pytest.raises(NotStored, match="This server has stopped serving the expert"):
        await here.service.revoke("math", actor="key_admin")
    assert [info.live for info in here.client.experts()] == [True, True, False]
    assert call.failed == EXPERT_REVOKED
    following = asyncio.ensure_future(here.service.follow(lambda *_: False))
    (tmp_path / "policy.db").rmdir()
    (tmp_path / "away.db").rename(tmp_path / "policy.db")
    async with asyncio.timeout(10):
        while here.store.weights().revoked != {"math"} or here.service._pool.changing.locked():
            await asyncio.sleep(0.01)
    following.cancel()
    assert here.client.published[-1] == ("public", "news")
    assert here.slots.digests(2) == zeros(here)
    assert [actor for actor, *_ in here.recorded] == ["key_admin"]


async def test_a_revoke_waits_until_its_users_have_ended(here: Local, tmp_path: Path, anchor: Path) -> None:
    await here.add(package(tmp_path, anchor))
    user = GatedCall("t", (ExpertSlotRef("public", 0, 1), ExpertSlotRef("math", 2, 2)), float("inf"))
    other = GatedCall("t", (ExpertSlotRef("public", 0, 1),), float("inf"))
    here.client.open += [user, other]
    revoking = asyncio.ensure_future(here.service.revoke("math", actor="key_admin"))
    await asyncio.sleep(0.1)
    assert not revoking.done()
    user.ended.set()
    assert (await revoking)["undelivered_responses"] == 0


async def test_the_anchor_and_what_is_not_loaded_cannot_be_revoked(here: Local) -> None:
    for name in ("public", "nothing", "math"):
        with pytest.raises(NotLoaded):
            await here.service.revoke(name, actor="key_admin")


async def test_a_revocation_that_drains_holds_up_nobody_elses(here: Local, tmp_path: Path, anchor: Path) -> None:
    await here.add(package(tmp_path, anchor))
    here.slots.busy = {2}
    draining = asyncio.ensure_future(here.service.revoke("math", actor="key_owner", drain_seconds=60.0))
    await asyncio.sleep(0.05)
    assert [info.id for info in here.client.experts() if info.live] == ["public", "news"]
    await asyncio.wait_for(here.service.revoke("news", actor="key_admin"), 5)
    assert not draining.done()
    here.slots.busy = set()
    assert (await draining)["expert"] == "math"


async def test_a_drain_waits_also_for_calls_that_have_not_reached_the_engine(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    await here.add(package(tmp_path, anchor))
    call = GatedCall("t", (ExpertSlotRef("math", 2, 2),), float("inf"))
    here.client.open.append(call)
    draining = asyncio.ensure_future(here.service.revoke("math", actor="key_owner", drain_seconds=60.0))
    await asyncio.sleep(0.2)
    assert (draining.done(), call.failed) == (False, None)
    call.ended.set()
    assert (await asyncio.wait_for(draining, 10))["undelivered_responses"] == 0


async def test_what_is_not_loaded_cannot_be_revoked_without_the_store(here: Local) -> None:
    def away() -> Any:
        raise StoreUnavailable("away")

    here.service._pool.repository.added = away  # type: ignore[method-assign]
    with pytest.raises(ChangeConflict, match="The store refused the change: away"):
        await here.service.revoke("math", actor="key_owner")


async def test_a_record_that_cannot_be_audited_is_answered_all_the_same(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    def fail(*_: object) -> None:
        raise StoreUnavailable("away")

    await here.add(package(tmp_path, anchor))
    here.service._revoker._record = fail
    here.service._revoker._confirm = fail
    record = await here.service.revoke("math", actor="key_admin")
    assert record["digests"] == zeros(here)


async def test_who_is_not_served_any_more_is_logged_and_audited_whoever_revoked(
    here: Local, tmp_path: Path, anchor: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await here.add(package(tmp_path, anchor))
    await here.add(package(tmp_path, anchor, expert="code"))
    with here.store.change(actor="admin", note="require", at=1.0) as change:
        expert = change.get(Expert, "math")
        assert expert is not None
        change.put(expert.model_copy(update={"required": True}))
        for id_ in ("t", "u"):
            change.put(Tenant(id=TenantId(id_), name=id_))
    await here.service.revoke("code", actor="key_owner")
    assert "expert.unserved" not in [action for _, action, _ in here.recorded]
    record = await here.service.revoke("math", actor="key_owner")
    (noted,) = [(actor, detail) for actor, action, detail in here.recorded if action == "expert.unserved"]
    weights_epoch = record["weights_epoch"]
    assert noted == (
        "key_owner",
        {"id": "math", "weights_epoch": weights_epoch, "total": 2, "projects": ["t", "u"]},
    )
    sentence = "expert math is revoked, and 2 projects whose requests must use it are not served: t, u"
    assert sentence in caplog.messages
    assert "projects" not in record
