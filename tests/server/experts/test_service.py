"""Adding, replacing and revoking experts: the real code over plain tensors, without an engine."""

from __future__ import annotations

import asyncio
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from slotkit.local import CHECKPOINT, MERGED, Local, local, package, zeros

from flexgate.experts.package.signature import TrustedKeys
from flexgate.experts.package.verify import open_package
from flexgate.policies.errors import ChangeRefused, StoreUnavailable
from flexgate.policies.store.store import Store
from flexgate.server.engine.frontend.calls import ExpertSlotRef, GatedCall
from flexgate.server.engine.frontend.canary import CanaryError, CanaryNotScheduled
from flexgate.server.engine.protocol.endings import EXPERT_REVOKED
from flexgate.server.experts import add as adding
from flexgate.server.experts.errors import ChangeConflict, NotLoaded, NotStored, PackageRefused
from flexgate.server.experts.repository import Added
from flexgate.server.experts.restore import at_start
from flexgate.server.experts.uploads import FREE_BYTES

pytestmark = pytest.mark.asyncio


async def test_an_added_expert_is_live_in_the_catalogue_and_permitted_to_nobody(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    job = await here.add(package(tmp_path, anchor))
    assert (job.state, job.stage, job.expert) == ("succeeded", "live", "math")
    assert job.result["weights_epoch"] == job.result["slot_epoch"] == 2
    assert job.result["digests"] == here.slots.digests(2)
    assert here.client.published[-1] == ("public", "news", "math")
    snapshot = here.store.snapshot()
    assert snapshot.experts["math"].live  # type: ignore[index]
    assert snapshot.experts["math"].grade == "removed"  # type: ignore[index]
    assert not snapshot.agreements


async def test_the_grade_of_an_added_expert_is_that_of_its_router(here: Local, tmp_path: Path, anchor: Path) -> None:
    """An expert whose router row was trained beside others' is not all that excluding it would have to remove."""
    await here.add(package(tmp_path, anchor, "joint", router="joint"))
    await here.add(package(tmp_path, anchor, "unsaid", router="unknown"))
    experts = here.store.snapshot().experts
    assert {str(id_): expert.grade for id_, expert in experts.items()} == {
        "public": "unknown",
        "news": "unknown",
        "joint": "router",
        "unsaid": "unknown",
    }


async def test_a_copy_that_the_disk_has_no_room_for_is_refused_before_it_is_written(
    here: Local, tmp_path: Path, anchor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = package(tmp_path, anchor)
    size = (source / "expert.safetensors").stat().st_size
    free = FREE_BYTES + size - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 60, 0, free))  # type: ignore[attr-defined]
    job = await here.add(source)
    assert (job.state, job.stage, job.error["code"], job.done) == ("failed", "copied", "disk_full", 0)
    assert job.error["message"] == (
        f"The disk has no room for a copy of {source.name}: {size} bytes are still to be written, {FREE_BYTES} must "
        f"stay free, and {free} are free."
    )
    assert not list((tmp_path / "experts").iterdir())
    free += 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 60, 0, free))  # type: ignore[attr-defined]
    assert (await here.add(source)).state == "succeeded"


async def test_a_revoked_expert_is_gone_from_slot_disk_and_catalogue(here: Local, tmp_path: Path, anchor: Path) -> None:
    await here.add(package(tmp_path, anchor))
    record = await here.service.revoke("math", actor="key_admin")
    assert record["digests"] == here.slots.digests(2) == zeros(here)
    assert record["weights_epoch"] == 3
    assert here.client.published[-1] == ("public", "news")
    assert not list((tmp_path / "experts").iterdir())
    assert not here.store.snapshot().experts["math"].live  # type: ignore[index]
    assert here.store.weights().revoked == {"math"}
    assert [action for _, action, _ in here.recorded] == ["weights.cleared"]


async def test_an_expert_of_the_checkpoint_stays_away_after_a_restart(
    here: Local, store: Store, anchor: Path, tmp_path: Path
) -> None:
    await here.service.revoke("news", actor="key_admin")
    state = at_start(store, CHECKPOINT, MERGED)
    assert state.without == {"news"}
    assert [expert.id for expert in state.resident] == ["public"]
    again = local(store, anchor, tmp_path, without=state.without, epoch=state.epoch)
    await again.service.restore(lambda *_: None)
    assert again.client.published[-1] == ("public",)
    assert again.slots.digests(1) == zeros(again)


async def test_a_restart_loads_what_was_added_and_nothing_else(
    here: Local, store: Store, anchor: Path, tmp_path: Path
) -> None:
    job = await here.add(package(tmp_path, anchor))
    (tmp_path / "experts" / "left-over").mkdir()
    state = at_start(store, CHECKPOINT, MERGED)
    assert (state.least_slots, state.epoch, state.without) == (3, 2, frozenset({"math"}))
    again = local(store, anchor, tmp_path, epoch=state.epoch)
    await again.service.restore(lambda *_: None)
    assert again.client.published[-1] == ("public", "news", "math")
    assert again.client.experts()[2].slot_epoch == 2
    assert again.slots.digests(2) == job.result["digests"]
    assert [path.name for path in (tmp_path / "experts").iterdir()] == [job.id]


async def test_a_damaged_private_copy_stops_the_start(here: Local, anchor: Path, tmp_path: Path) -> None:
    job = await here.add(package(tmp_path, anchor))
    weights = tmp_path / "experts" / job.id / "expert.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    again = local(here.store, anchor, tmp_path)
    with pytest.raises(Exception, match="DigestMismatch"):
        await again.service.restore(lambda *_: None)
    weights.parent.joinpath("manifest.json").unlink()
    with pytest.raises(PackageRefused, match="'math', which was added earlier, cannot be loaded"):
        await local(here.store, anchor, tmp_path).service.restore(lambda *_: None)


async def test_a_newer_version_replaces_the_former_whose_slot_is_zeroed(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    await here.add(package(tmp_path, anchor, seed=1))
    same = await here.add(package(tmp_path, anchor, seed=2))
    assert (same.state, same.error["code"]) == ("failed", "expert_version_not_newer")
    newer = await here.add(package(tmp_path, anchor, seed=2, version=2))
    assert newer.state == "succeeded"
    assert newer.result["slot"] == 3
    assert here.client.published[-1] == ("public", "news", "math")
    for _ in range(200):
        if here.slots.digests(2) == zeros(here) and 2 not in here.slots.table.live:
            break
        await asyncio.sleep(0.01)
    assert here.slots.digests(2) == zeros(here)
    assert [entry.version for entry in here.service._pool.repository.added()] == [2]


@pytest.mark.parametrize("what", ["fill", "open", "canary"])
async def test_what_fails_before_the_commit_leaves_nothing_behind(
    here: Local, tmp_path: Path, anchor: Path, what: str
) -> None:
    here.slots.fails[what] = 1
    here.canary_fails += [CanaryError("it answers with NaN")] if what == "canary" else []
    job = await here.add(package(tmp_path, anchor))
    assert (job.state, job.error["code"]) == ("failed", "engine_failed")
    assert here.slots.digests(2) == zeros(here)
    assert here.slots.table.live == {0: 1, 1: 1}
    assert here.client.published == [("public", "news")]
    assert here.store.weights().last == {}
    assert "math" not in here.store.snapshot().experts
    assert not list((tmp_path / "experts").iterdir())
    assert (await here.add(package(tmp_path, anchor))).state == "succeeded"


async def test_an_engine_too_busy_to_try_an_expert_says_so_and_leaves_nothing_behind(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    here.canary_fails.append(CanaryNotScheduled("no place in the batch was free within 60 seconds"))
    job = await here.add(package(tmp_path, anchor))
    assert job.error == {
        "code": "canary_not_scheduled",
        "message": "The engine was too busy to try the expert: no place in the batch was free within 60 seconds. "
        "Nothing was changed. Add it again when fewer requests are running, or start the server with a larger "
        "--max-num-seqs.",
    }
    assert here.slots.digests(2) == zeros(here)
    assert (await here.add(package(tmp_path, anchor))).state == "succeeded"


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


async def test_a_package_of_another_owner_takes_no_name_over(here: Local, tmp_path: Path, anchor: Path) -> None:
    await here.add(package(tmp_path, anchor))
    await here.service.revoke("math", actor="key_admin")
    taken = await here.add(package(tmp_path, anchor, owner="mallory"))
    assert (taken.state, taken.error["code"]) == ("failed", "expert_of_another_owner")
    foreign = await here.add(package(tmp_path, anchor, expert="code"), owner="gazette")
    assert (foreign.state, foreign.error["code"]) == ("failed", "expert_of_another_owner")
    assert (await here.add(package(tmp_path, anchor))).state == "succeeded"


async def test_the_commit_itself_refuses_the_id_of_another_owner(
    here: Local, tmp_path: Path, anchor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the check that comes before the package is loaded said nothing: another server may have been faster."""
    await here.add(package(tmp_path, anchor))
    await here.service.revoke("math", actor="key_admin")
    monkeypatch.setattr(here.service._pool.repository, "require_owner", lambda _: None)
    taken = await here.add(package(tmp_path, anchor, owner="mallory"))
    assert (taken.state, taken.error["code"]) == ("failed", "expert_of_another_owner")
    assert here.store.snapshot().experts["math"].owner == "acme"  # type: ignore[index]


async def test_full_slots_are_refused_with_what_would_help(here: Local, tmp_path: Path, anchor: Path) -> None:
    for expert in ("a", "b", "c"):
        assert (await here.add(package(tmp_path, anchor, expert=expert))).state == "succeeded"
    job = await here.add(package(tmp_path, anchor, expert="d"))
    assert job.error == {
        "code": "slots_full",
        "message": "All 5 expert slots are taken. Revoke an expert, or start the server with a larger --max-experts.",
    }


async def test_an_owner_takes_no_more_than_its_share_of_the_slots(here: Local, tmp_path: Path, anchor: Path) -> None:
    for expert in ("a", "b"):
        assert (await here.add(package(tmp_path, anchor, expert=expert), owner="acme")).state == "succeeded"
    refused = await here.add(package(tmp_path, anchor, expert="c"), owner="acme")
    assert refused.error == {
        "code": "owner_slots_full",
        "message": "Owner 'acme' uses 2 of its 2 expert slots (former versions in use count). "
        "Revoke one of its experts, or ask an administrator to add this package.",
    }
    assert (await here.add(package(tmp_path, anchor, expert="d", owner="other"), owner="other")).state == "succeeded"
    await here.service.revoke("a", actor="key_owner")
    assert (await here.add(package(tmp_path, anchor, expert="c"), owner="acme")).state == "succeeded"


async def test_an_administrator_adds_beyond_an_owners_share(here: Local, tmp_path: Path, anchor: Path) -> None:
    for expert in ("a", "b", "c"):
        assert (await here.add(package(tmp_path, anchor, expert=expert))).state == "succeeded"


async def test_packages_of_an_owner_that_come_together_share_its_slots(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    packages = [package(tmp_path, anchor, expert=expert) for expert in ("a", "b", "c")]
    jobs = await asyncio.gather(*(here.add(path, owner="acme") for path in packages))
    assert sorted(job.state for job in jobs) == ["failed", "succeeded", "succeeded"]


async def test_versions_that_requests_still_use_count_for_their_owner(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    for version in (1, 2):
        assert (await here.add(package(tmp_path, anchor, version=version), owner="acme")).state == "succeeded"
        here.slots.busy = {2}
    refused = await here.add(package(tmp_path, anchor, expert="code"), owner="acme")
    assert refused.error["code"] == "owner_slots_full"
    here.slots.busy = set()
    while 2 in {info.slot for infos in here.service._pool.retiring.values() for info in infos}:
        await asyncio.sleep(0.01)
    assert (await here.add(package(tmp_path, anchor, expert="code"), owner="acme")).state == "succeeded"


async def test_what_an_owner_is_refused_names_nothing_of_other_owners(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    """Neither their names nor their experts, but for the id that it chose itself."""
    assert (await here.add(package(tmp_path, anchor, expert="hidden-one", owner="rival"))).state == "succeeded"
    refused = [
        await here.add(package(tmp_path, anchor, expert="hidden-one"), owner="acme"),
        await here.add(package(tmp_path, anchor, expert="other", owner="rival"), owner="acme"),
    ]
    await here.add(package(tmp_path, anchor, expert="a"), owner="acme")
    await here.add(package(tmp_path, anchor, expert="b"), owner="acme")
    refused.append(await here.add(package(tmp_path, anchor, expert="c"), owner="acme"))
    here.service._pool.per_owner = 9
    refused.append(await here.add(package(tmp_path, anchor, expert="c"), owner="acme"))
    codes = ["expert_of_another_owner"] * 2 + ["owner_slots_full", "slots_full"]
    assert [job.error["code"] for job in refused] == codes
    messages = [job.error["message"] for job in refused]
    assert not any(name in message for message in messages for name in ("rival", "news", "gazette"))
    assert not any("hidden-one" in message for message in messages[1:])


async def test_an_unsigned_package_needs_a_server_that_says_so(here: Local, tmp_path: Path, anchor: Path) -> None:
    object.__setattr__(here.service._pool.places, "trusted_keys", TrustedKeys({}))
    job = await here.add(package(tmp_path, anchor))
    assert job.error["code"] == "package_refused"
    assert "is not signed" in job.error["message"]


async def test_the_anchor_and_what_is_not_loaded_cannot_be_revoked(here: Local) -> None:
    for name in ("public", "nothing", "math"):
        with pytest.raises(NotLoaded):
            await here.service.revoke(name, actor="key_admin")


async def test_what_only_a_start_would_load_can_be_revoked(
    here: Local, store: Store, tmp_path: Path, anchor: Path
) -> None:
    await here.add(package(tmp_path, anchor))
    again = local(store, anchor, tmp_path, epoch=2)
    object.__setattr__(again.service._pool.places, "trusted_keys", TrustedKeys({}))
    await again.service.restore(lambda *_: None)
    assert again.client.published[-1] == ("public", "news")
    record = await again.service.revoke("math", actor="key_owner", drain_seconds=1.0)
    assert (record["slot"], record["slot_epoch"], record["weights_epoch"], record["digests"]) == (2, 2, 3, [])
    assert again.recorded == [("key_owner", "weights.cleared", record)]
    assert list((tmp_path / "experts").glob("job*")) == []
    assert at_start(store, CHECKPOINT, MERGED).resident == CHECKPOINT
    with pytest.raises(NotLoaded):
        await again.service.revoke("math", actor="key_owner")


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


async def test_two_experts_arrive_at_the_same_time_in_slots_of_their_own(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    packages = [package(tmp_path, anchor, expert=expert) for expert in ("a", "b", "c")]
    jobs = await asyncio.gather(*(here.add(path) for path in packages))
    assert [job.state for job in jobs] == ["succeeded"] * 3
    assert sorted(job.result["slot"] for job in jobs) == [2, 3, 4]
    assert sorted(job.result["slot_epoch"] for job in jobs) == [2, 3, 4]
    assert sorted(here.client.published[-1]) == ["a", "b", "c", "news", "public"]


async def test_an_expert_whose_signer_is_not_trusted_any_more_is_left_out_at_a_start(
    here: Local, store: Store, tmp_path: Path, anchor: Path
) -> None:
    await here.add(package(tmp_path, anchor))
    again = local(store, anchor, tmp_path, epoch=2)
    object.__setattr__(again.service._pool.places, "trusted_keys", TrustedKeys({}))
    await again.service.restore(lambda *_: None)
    assert again.client.published[-1] == ("public", "news")
    assert again.slots.digests(2) == zeros(again)
    object.__setattr__(again.service._pool.places, "trusted_keys", None)
    assert (await again.add(package(tmp_path, anchor, expert="code"))).result["slot"] == 3
    assert (await again.add(package(tmp_path, anchor, expert="law"))).result["slot"] == 4
    assert (await again.add(package(tmp_path, anchor, expert="wine"))).error == {
        "code": "slots_full",
        "message": "All 5 expert slots are taken, 1 of them by packages that were not loaded at the start. "
        "Revoke an expert, or start the server with a larger --max-experts.",
    }


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


async def test_tidying_up_leaves_what_is_arriving_and_what_has_just_been_committed(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    pool = here.service._pool
    private = tmp_path / "experts"
    for name in ("job_1", ".job_1.abc.partial", "job_2", "left-over"):
        (private / name).mkdir(parents=True)
    pool.arriving |= {"job_1", "job_2"}
    added = pool.repository.added

    def commits_meanwhile() -> tuple[Added, ...]:
        pool.arriving.discard("job_2")
        return (*added(), Added("math", 1, 2, 2, "job_2", "", ""))

    pool.repository.added = commits_meanwhile  # type: ignore[method-assign]
    await pool.forget_copies()
    assert sorted(path.name for path in private.iterdir()) == [".job_1.abc.partial", "job_1", "job_2"]
