"""Adding, replacing and withdrawing experts: the real code over plain tensors, without an engine."""

from __future__ import annotations

import asyncio
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from packagekit import make_package
from residencykit.local import CHECKPOINT, MERGED, Local, local, withdrawn_in

from flexgate.experts.signature import TrustedKeys
from flexgate.experts.verify import open_package
from flexgate.policies.errors import StoreUnavailable
from flexgate.policies.store.store import Store
from flexgate.policies.terms import ExpertId
from flexgate.server.engine.canary import CanaryError, CanaryNotScheduled
from flexgate.server.engine.client import ExpertLease, GatedCall, GateGrant
from flexgate.server.engine.scheduler import EXPERT_REVOKED
from flexgate.server.experts import adding
from flexgate.server.experts.errors import ChangeConflict, CommitUnknown, NotResident, PackageRefused
from flexgate.server.experts.repository import Added
from flexgate.server.experts.start import at_start
from flexgate.server.experts.uploads import FREE_BYTES
from flexgate.server.policy import PolicySource

pytestmark = pytest.mark.asyncio


@pytest.fixture
def here(store: Store, anchor: Path, tmp_path: Path) -> Local:
    return local(store, anchor, tmp_path)


def package(tmp_path: Path, anchor: Path, expert: str = "math", owner: str = "acme", **options: Any) -> Path:
    target = tmp_path / f"package-{expert}-{len(list(tmp_path.iterdir()))}"
    make_package(target, anchor, expert=expert, owner=owner, **options)
    return target


def zeros(here: Local) -> list[str]:
    """What a rank's empty slot hashes to; slot 4 is never the first free one in these tests."""
    return here.slots.digests(4)


async def test_an_added_expert_is_live_in_the_catalogue_and_permitted_to_nobody(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    job = await here.add(package(tmp_path, anchor))
    assert (job.state, job.stage, job.expert) == ("succeeded", "live", "math")
    assert job.result["weights_epoch"] == job.result["generation"] == 2
    assert job.result["digests"] == here.slots.digests(2)
    assert here.client.published[-1] == ("public", "news", "math")
    snapshot = here.store.snapshot()
    assert snapshot.experts["math"].live  # type: ignore[index]
    assert not snapshot.terms


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
    assert here.store.weights().withdrawn == {"math"}
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
    assert again.client.experts()[2].generation == 2
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
    assert [entry.version for entry in here.service._residence.repository.added()] == [2]


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


async def test_a_store_that_refuses_leaves_the_expert_as_it_was(here: Local, tmp_path: Path, anchor: Path) -> None:
    await here.add(package(tmp_path, anchor))
    call = GatedCall(GateGrant("t", (ExpertLease("math", 2, 2),), float("inf")))
    here.client.open.append(call)
    here.store.engine.dispose()
    (tmp_path / "policy.db").rename(tmp_path / "away.db")
    (tmp_path / "policy.db").mkdir()
    with pytest.raises(ChangeConflict, match="The store refused"):
        await here.service.revoke("math", actor="key_admin")
    assert here.client.published[-1] == ("public", "news", "math")
    assert call.failed is None
    assert here.slots.digests(2) != zeros(here)


async def test_a_revoke_waits_until_its_users_have_ended(here: Local, tmp_path: Path, anchor: Path) -> None:
    await here.add(package(tmp_path, anchor))
    user = GatedCall(GateGrant("t", (ExpertLease("public", 0, 1), ExpertLease("math", 2, 2)), float("inf")))
    other = GatedCall(GateGrant("t", (ExpertLease("public", 0, 1),), float("inf")))
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


async def test_full_slots_are_refused_with_what_would_help(here: Local, tmp_path: Path, anchor: Path) -> None:
    for expert in ("a", "b", "c"):
        assert (await here.add(package(tmp_path, anchor, expert=expert))).state == "succeeded"
    job = await here.add(package(tmp_path, anchor, expert="d"))
    assert job.error == {
        "code": "slots_full",
        "message": "All 5 expert slots are taken. Withdraw an expert, or start the server with a larger --max-experts.",
    }


async def test_an_unsigned_package_needs_a_server_that_says_so(here: Local, tmp_path: Path, anchor: Path) -> None:
    object.__setattr__(here.service._residence.places, "trusted_keys", TrustedKeys({}))
    job = await here.add(package(tmp_path, anchor))
    assert job.error["code"] == "package_refused"
    assert "is not signed" in job.error["message"]


async def test_the_anchor_and_what_is_not_loaded_cannot_be_withdrawn(here: Local) -> None:
    for name in ("public", "nothing", "math"):
        with pytest.raises(NotResident):
            await here.service.revoke(name, actor="key_admin")


async def test_what_another_process_withdraws_is_taken_out_here_too(here: Local, tmp_path: Path, anchor: Path) -> None:
    await here.add(package(tmp_path, anchor))
    following = asyncio.ensure_future(here.service.follow(withdrawn_in(here.store)))
    elsewhere = here.service._residence.repository
    await asyncio.to_thread(elsewhere.revoke, "math", 2, actor="key_else", at=5.0)
    for _ in range(300):
        if here.client.published[-1] == ("public", "news") and here.slots.digests(2) == zeros(here):
            break
        await asyncio.sleep(0.01)
    following.cancel()
    assert here.client.published[-1] == ("public", "news")
    assert here.slots.digests(2) == zeros(here)
    assert not here.store.snapshot().experts["math"].live  # type: ignore[index]


async def test_what_was_withdrawn_elsewhere_and_added_there_again_is_taken_out_here(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    source = PolicySource(here.store, lambda: {i.id: i.generation for i in here.client.experts()}, lease_s=9, poll_s=9)
    assert source.confirm().experts[ExpertId("news")].live
    other = local(here.store, anchor, tmp_path / "other")
    await other.service.revoke("news", actor="key_else")
    assert (await other.add(package(tmp_path, anchor, expert="news", owner="gazette", version=2))).state == "succeeded"
    assert here.store.snapshot().experts[ExpertId("news")].live
    assert not source.confirm().experts[ExpertId("news")].live
    following = asyncio.ensure_future(here.service.follow(source.withdrawn))
    async with asyncio.timeout(10):
        while here.client.published[-1] != ("public",) or here.slots.digests(1) != zeros(here):
            await asyncio.sleep(0.01)
    following.cancel()


async def test_what_another_server_withdrew_is_replaced_only_once_it_is_out(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    path = package(tmp_path, anchor, expert="news", owner="gazette", version=2)
    await local(here.store, anchor, tmp_path / "other").service.revoke("news", actor="key_else")
    assert (await here.add(path)).error == {
        "code": "experts_changing",
        "message": "Another server withdrew expert 'news', which is being taken out here. Try again in a moment.",
    }
    following = asyncio.ensure_future(here.service.follow(withdrawn_in(here.store)))
    async with asyncio.timeout(10):
        while here.client.published[-1] != ("public",) or here.service._residence.changing.locked():
            await asyncio.sleep(0.01)
    following.cancel()
    assert (await here.add(path)).state == "succeeded"


async def test_what_only_a_start_would_load_can_be_withdrawn(
    here: Local, store: Store, tmp_path: Path, anchor: Path
) -> None:
    await here.add(package(tmp_path, anchor))
    again = local(store, anchor, tmp_path, epoch=2)
    object.__setattr__(again.service._residence.places, "trusted_keys", TrustedKeys({}))
    await again.service.restore(lambda *_: None)
    assert again.client.published[-1] == ("public", "news")
    record = await again.service.revoke("math", actor="key_owner", drain_seconds=1.0)
    assert (record["slot"], record["generation"], record["weights_epoch"], record["digests"]) == (2, 2, 3, [])
    assert again.recorded == [("key_owner", "weights.cleared", record)]
    assert list((tmp_path / "experts").glob("job*")) == []
    assert at_start(store, CHECKPOINT, MERGED).resident == CHECKPOINT
    with pytest.raises(NotResident):
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


async def test_a_withdrawal_does_not_wait_until_another_expert_is_loaded(
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
    assert job.result["generation"] == 3
    assert here.client.published[-1] == ("public", "math")


async def test_two_experts_arrive_at_the_same_time_in_slots_of_their_own(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    packages = [package(tmp_path, anchor, expert=expert) for expert in ("a", "b", "c")]
    jobs = await asyncio.gather(*(here.add(path) for path in packages))
    assert [job.state for job in jobs] == ["succeeded"] * 3
    assert sorted(job.result["slot"] for job in jobs) == [2, 3, 4]
    assert sorted(job.result["generation"] for job in jobs) == [2, 3, 4]
    assert sorted(here.client.published[-1]) == ["a", "b", "c", "news", "public"]


async def test_what_was_committed_is_not_undone_when_the_policy_cannot_be_confirmed(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    def fail() -> None:
        raise StoreUnavailable("away")

    here.service._adding._confirm = fail
    job = await here.add(package(tmp_path, anchor))
    assert job.state == "succeeded"
    assert here.client.published[-1] == ("public", "news", "math")
    assert (tmp_path / "experts" / job.id / "manifest.json").is_file()


async def test_an_add_whose_commit_was_made_and_not_answered_is_not_undone(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    repository = here.service._residence.repository
    commit = repository.add

    def lost(*args: Any, **kwargs: Any) -> None:
        commit(*args, **kwargs)
        raise StoreUnavailable("the answer was lost")

    repository.add = lost  # type: ignore[method-assign]
    job = await here.add(package(tmp_path, anchor))
    assert job.state == "succeeded"
    assert (tmp_path / "experts" / job.id / "manifest.json").is_file()


async def test_an_add_that_nobody_knows_to_be_committed_says_what_is_served(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    repository = here.service._residence.repository
    added = repository.added

    def broken(*_: Any, **__: Any) -> Any:
        raise StoreUnavailable("away")

    def breaks_off(*_: Any, **__: Any) -> None:
        repository.added = broken  # type: ignore[method-assign]
        raise StoreUnavailable("away")

    repository.add = breaks_off  # type: ignore[method-assign]
    said = "The store broke off: away. Nothing tells whether it took the change. "
    job = await here.add(package(tmp_path, anchor))
    assert job.error == {
        "code": "commit_unknown",
        "message": f"{said}Nobody can use the expert; add it again, or restart the server, which loads it if it was "
        "taken.",
    }
    repository.added = added  # type: ignore[method-assign]
    job = await here.add(package(tmp_path, anchor, expert="news", owner="gazette", version=2))
    assert job.error == {
        "code": "commit_unknown",
        "message": f"{said}The former version is still served. Restart the server, which loads the new one if it was "
        "taken; if it was not, add it again.",
    }
    assert [info.generation for info in here.client.experts() if info.id == "news"] == [1]


async def test_a_slot_that_an_unknown_addition_keeps_is_free_once_it_was_withdrawn(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    repository = here.service._residence.repository
    added, commit = repository.added, repository.add

    def away() -> Any:
        raise StoreUnavailable("away")

    def lost(*args: Any, **kwargs: Any) -> None:
        commit(*args, **kwargs)
        repository.added = away  # type: ignore[method-assign]
        raise StoreUnavailable("the answer was lost")

    repository.add = lost  # type: ignore[method-assign]
    assert (await here.add(package(tmp_path, anchor))).error["code"] == "commit_unknown"
    repository.added, repository.add = added, commit  # type: ignore[method-assign]
    assert (await here.add(package(tmp_path, anchor, expert="code"))).result["slot"] == 3
    await here.service.revoke("math", actor="key_owner")
    assert (await here.add(package(tmp_path, anchor, expert="law"))).result["slot"] == 2


async def test_after_a_lost_answer_the_store_is_believed_about_which_version_it_took(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    repository = here.service._residence.repository
    added, commit = repository.added, repository.add

    def away() -> Any:
        raise StoreUnavailable("away")

    def lost(*args: Any, **kwargs: Any) -> None:
        commit(*args, **kwargs)
        repository.added = away  # type: ignore[method-assign]
        raise StoreUnavailable("the answer was lost")

    await here.add(package(tmp_path, anchor))
    repository.add = lost  # type: ignore[method-assign]
    job = await here.add(package(tmp_path, anchor, version=2))
    assert job.error["code"] == "commit_unknown"
    repository.added, repository.add = added, commit  # type: ignore[method-assign]
    assert (await here.add(package(tmp_path, anchor, version=3))).error == {
        "code": "expert_version_not_loaded",
        "message": "The store has version 2 of expert 'math', which this server did not load. Restart it.",
    }


@pytest.mark.parametrize("again", ["by whoever asked", "as the store says"])
@pytest.mark.parametrize("drain_seconds", [0.0, 0.05])
async def test_a_withdrawal_that_nobody_knows_to_be_committed_gives_the_expert_to_nobody(
    here: Local, tmp_path: Path, anchor: Path, drain_seconds: float, again: str
) -> None:
    repository = here.service._residence.repository
    commit, withdrawn = repository.revoke, repository.withdrawn

    def broken() -> Any:
        raise StoreUnavailable("away")

    def broken_off(*_: Any, **__: Any) -> int:
        raise StoreUnavailable("away")

    def lost(*args: Any, **kwargs: Any) -> int:
        commit(*args, **kwargs)
        repository.withdrawn = broken  # type: ignore[method-assign]
        raise StoreUnavailable("the answer was lost")

    await here.add(package(tmp_path, anchor))
    call = GatedCall(GateGrant("t", (ExpertLease("math", 2, 2),), float("inf")))
    call.ended.set()
    here.client.open.append(call)
    repository.revoke = lost  # type: ignore[method-assign]
    with pytest.raises(CommitUnknown) as unknown:
        await here.service.revoke("math", actor="key_admin", drain_seconds=drain_seconds)
    assert (unknown.value.code, str(unknown.value)) == (
        "commit_unknown",
        "The store broke off: the answer was lost. Nothing tells whether it took the change. Nobody gets the expert "
        "from now on, and the requests that might use it are ended. Withdraw it again, or restart the server, which "
        "loads it if the change was not taken.",
    )
    assert call.failed == EXPERT_REVOKED
    assert [info.live for info in here.client.experts()] == [True, True, False]
    repository.revoke = broken_off  # type: ignore[method-assign]
    for seconds in (0.0, 0.05):
        with pytest.raises(CommitUnknown):
            await here.service.revoke("math", actor="key_admin", drain_seconds=seconds)
    repository.withdrawn = frozenset  # type: ignore[method-assign]
    for seconds in (0.0, 0.05):
        with pytest.raises(ChangeConflict, match="The store refused"):
            await here.service.revoke("math", actor="key_admin", drain_seconds=seconds)
    assert [info.live for info in here.client.experts()] == [True, True, False]
    repository.revoke, repository.withdrawn = commit, withdrawn  # type: ignore[method-assign]
    if again == "by whoever asked":
        assert (await here.service.revoke("math", actor="key_admin"))["expert"] == "math"
    else:
        following = asyncio.ensure_future(here.service.follow(withdrawn_in(here.store)))
        async with asyncio.timeout(10):
            while len(here.client.experts()) > 2 or here.service._residence.changing.locked():
                await asyncio.sleep(0.01)
        following.cancel()
    assert here.client.published[-1] == ("public", "news")
    assert here.slots.digests(2) == zeros(here)


async def test_an_expert_whose_signer_is_not_trusted_any_more_is_left_out_at_a_start(
    here: Local, store: Store, tmp_path: Path, anchor: Path
) -> None:
    await here.add(package(tmp_path, anchor))
    again = local(store, anchor, tmp_path, epoch=2)
    object.__setattr__(again.service._residence.places, "trusted_keys", TrustedKeys({}))
    await again.service.restore(lambda *_: None)
    assert again.client.published[-1] == ("public", "news")
    assert again.slots.digests(2) == zeros(again)
    object.__setattr__(again.service._residence.places, "trusted_keys", None)
    assert (await again.add(package(tmp_path, anchor, expert="code"))).result["slot"] == 3
    assert (await again.add(package(tmp_path, anchor, expert="law"))).result["slot"] == 4
    assert (await again.add(package(tmp_path, anchor, expert="wine"))).error == {
        "code": "slots_full",
        "message": "All 5 expert slots are taken, 1 of them by packages that this start left out. Withdraw an expert, "
        "or start the server with a larger --max-experts.",
    }


async def test_a_withdrawal_that_drains_holds_up_nobody_elses(here: Local, tmp_path: Path, anchor: Path) -> None:
    await here.add(package(tmp_path, anchor))
    here.slots.busy = {2}
    draining = asyncio.ensure_future(here.service.revoke("math", actor="key_owner", drain_seconds=60.0))
    await asyncio.sleep(0.05)
    assert [info.id for info in here.client.experts() if info.live] == ["public", "news"]
    await asyncio.wait_for(here.service.revoke("news", actor="key_admin"), 5)
    assert not draining.done()
    here.slots.busy = set()
    assert (await draining)["expert"] == "math"


async def test_a_record_that_cannot_be_audited_is_answered_all_the_same(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    def fail(*_: object) -> None:
        raise StoreUnavailable("away")

    await here.add(package(tmp_path, anchor))
    here.service._withdrawing._record = fail
    here.service._withdrawing._confirm = fail
    record = await here.service.revoke("math", actor="key_admin")
    assert record["digests"] == zeros(here)


async def test_following_another_process_outlives_a_store_that_fails(here: Local, tmp_path: Path, anchor: Path) -> None:
    await here.add(package(tmp_path, anchor))
    repository = here.service._residence.repository
    await asyncio.to_thread(repository.revoke, "math", 2, actor="key_else", at=5.0)
    asked = repository.revoked
    failures = [StoreUnavailable("away")]

    def failing() -> dict[str, int]:
        if failures:
            raise failures.pop()
        return asked()

    repository.revoked = failing  # type: ignore[method-assign]
    following = asyncio.ensure_future(here.service.follow(lambda expert, _: expert == "math"))
    for _ in range(400):
        if here.client.published[-1] == ("public", "news") and here.slots.digests(2) == zeros(here):
            break
        await asyncio.sleep(0.01)
    following.cancel()
    assert not failures
    assert here.slots.digests(2) == zeros(here)


async def test_tidying_up_leaves_what_is_arriving_and_what_has_just_been_committed(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    residence = here.service._residence
    private = tmp_path / "experts"
    for name in ("job_1", ".job_1.abc.partial", "job_2", "left-over"):
        (private / name).mkdir(parents=True)
    residence.arriving |= {"job_1", "job_2"}
    added = residence.repository.added

    def commits_meanwhile() -> tuple[Added, ...]:
        residence.arriving.discard("job_2")
        return (*added(), Added("math", 1, 2, 2, "job_2", "", ""))

    residence.repository.added = commits_meanwhile  # type: ignore[method-assign]
    await residence.forget_copies()
    assert sorted(path.name for path in private.iterdir()) == [".job_1.abc.partial", "job_1", "job_2"]
