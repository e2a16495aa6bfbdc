"""Adding and replacing experts: the real code over plain tensors, without an engine."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from packagekit import statement
from slotkit.local import CHECKPOINT, LAYERS, MAP, MERGED, Local, local, package, zeros

from flexgate.experts.checkpoint.base import base_identity
from flexgate.experts.checkpoint.ownership import Ownership, Unit
from flexgate.experts.package.signature import TrustedKeys
from flexgate.experts.package.size import ExpertSize
from flexgate.experts.package.verify import open_package
from flexgate.experts.package.write import write_package
from flexgate.policies.documents import Expert
from flexgate.policies.store.store import Store
from flexgate.server.engine.frontend.canary import CanaryError, CanaryNotScheduled
from flexgate.server.engine.protocol.slots import SlotMap
from flexgate.server.experts.errors import PackageRefused
from flexgate.server.experts.repository import Added
from flexgate.server.experts.restore import at_start, require_ranks
from flexgate.server.experts.uploads import FREE_BYTES
from flexgate.server.lifecycle.seed import prepare

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
    """The base never saw it; routers that are served may have been tuned with its own."""
    await here.add(package(tmp_path, anchor, "joint", router="joint"))
    await here.add(package(tmp_path, anchor, "unsaid", router="unknown"))
    experts = here.store.snapshot().experts
    assert {str(id_): expert.grade for id_, expert in experts.items()} == {
        "public": "unknown",
        "news": "unknown",
        "joint": "router",
        "unsaid": "router",
    }


@pytest.mark.parametrize("router", ["joint", "unknown"])
async def test_no_owner_lowers_what_projects_exclude_by_adding_an_expert(
    here: Local, tmp_path: Path, anchor: Path, router: str
) -> None:
    """Projects that demand the grade `removed` would have all their requests refused."""
    job = await here.add(package(tmp_path, anchor, router=router), owner="acme")
    assert (job.state, job.error["code"]) == ("failed", "expert_router_not_own")
    assert job.error["message"].startswith(f"The package's 'training.router' is '{router}', so that excluding")
    assert "math" not in here.store.snapshot().experts
    assert (await here.add(package(tmp_path, anchor), owner="acme")).state == "succeeded"
    assert here.store.snapshot().experts["math"].grade == "removed"  # type: ignore[index]


async def test_no_package_raises_the_grade_of_what_it_replaces(here: Local, tmp_path: Path, anchor: Path) -> None:
    """The shared weights of the checkpoint go on having learnt from the unit."""
    with here.store.change(actor="start", at=9.0) as change:
        news = change.get(Expert, "news")
        assert news is not None
        change.put(news.model_copy(update={"grade": "shared"}))
    await here.service.revoke("news", actor="key_owner")
    assert (
        await here.add(package(tmp_path, anchor, "news", "gazette", version=2), owner="gazette")
    ).state == "succeeded"
    assert here.store.snapshot().experts["news"].grade == "shared"  # type: ignore[index]
    await here.service.revoke("news", actor="key_owner")
    assert here.store.snapshot().experts["news"].grade == "shared"  # type: ignore[index]


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


async def test_a_narrow_expert_is_loaded_as_the_full_one_that_a_merge_makes_of_it(
    here: Local, store: Store, tmp_path: Path, anchor: Path
) -> None:
    """The same bits lie in a full slot: the narrow FFN, and zeros beside it; after a restart, too."""
    narrow = package(tmp_path, anchor, "math", size=ExpertSize(width=5))
    base = base_identity(anchor)
    with open_package(narrow, base=base, trusted_keys=None, into=tmp_path / "copy") as opened:
        layers = [opened.layer(number) for number in range(LAYERS)]
    write_package(tmp_path / "full", statement("code"), base, layers, key=None)
    added = await here.add(narrow)
    full = await here.add(tmp_path / "full")
    assert (added.state, full.state) == ("succeeded", "succeeded")
    assert added.result["digests"] == full.result["digests"]
    again = local(store, anchor, tmp_path, epoch=3)
    await again.service.restore(lambda *_: None)
    assert again.slots.digests(added.result["slot"]) == added.result["digests"]


async def test_a_low_rank_expert_takes_the_smallest_slot_that_has_room_and_comes_back(
    here: Local, store: Store, tmp_path: Path, anchor: Path
) -> None:
    small = await here.add(package(tmp_path, anchor, "small", size=ExpertSize(rank=1)))
    large = await here.add(package(tmp_path, anchor, "large", size=ExpertSize(rank=3)))
    full = await here.add(package(tmp_path, anchor, "full"))
    assert [job.result["slot"] for job in (small, large, full)] == [6, 5, 2]
    assert here.client.published[-1] == ("public", "news", "full", "large", "small")
    before = at_start(store, CHECKPOINT, MERGED)
    assert (before.least_slots, before.ranks) == (3, {"small": (6, 1), "large": (5, 3)})
    require_ranks(before, MAP.rank_of)
    again = local(store, anchor, tmp_path, epoch=4)
    await again.service.restore(lambda *_: None)
    for job in (small, large, full):
        assert again.slots.digests(job.result["slot"]) == job.result["digests"]
    await here.service.revoke("large", actor="key_admin")
    assert not any(bool(part.any()) for rank in here.slots.ranks for layer in rank.layers for part in layer._parts(5))


async def test_while_a_low_rank_expert_is_served_the_public_one_is_graded_shared(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    """Excluding the public expert leaves it in what is added to it; the expert's own exclusion is whole."""
    with here.store.change(actor="start", at=9.0) as change:
        public = change.get(Expert, "public")
        assert public is not None
        change.put(public.model_copy(update={"grade": "removed"}))
    await here.add(package(tmp_path, anchor))
    assert here.store.snapshot().experts["public"].grade == "removed"  # type: ignore[index]
    await here.add(package(tmp_path, anchor, "low", size=ExpertSize(rank=3)))
    experts = here.store.snapshot().experts
    assert (experts["public"].grade, experts["low"].grade) == ("shared", "removed")  # type: ignore[index]


async def test_a_start_grades_the_public_expert_by_what_contains_it(
    here: Local, store: Store, tmp_path: Path, anchor: Path
) -> None:
    units = (Unit("public", None, "", grade="removed"), Unit("news", "gazette", "news", grade="removed"))
    ownership = Ownership(units, (b"\0\1",))
    await here.add(package(tmp_path, anchor, "low", size=ExpertSize(rank=3)))
    before = at_start(store, units, MERGED)
    for kept, grade in ((True, "shared"), (False, "removed")):
        prepare(store, units, epoch=before.epoch, at=9.0, ownership=ownership, public_kept=kept)
        assert store.snapshot().experts["public"].grade == grade  # type: ignore[index]


async def test_slots_that_lost_their_room_stop_the_start_in_a_sentence(
    here: Local, store: Store, tmp_path: Path, anchor: Path
) -> None:
    await here.add(package(tmp_path, anchor, "low", size=ExpertSize(rank=3)))
    before = at_start(store, CHECKPOINT, MERGED)
    for kinds in ((), (2, 2), (2,)):
        map_ = SlotMap.of_checkpoint((b"\0\1",), 2, 5, kinds)
        with pytest.raises(
            PackageRefused, match="'low' of rank 3 has slot 5, which has no room for it now: start with"
        ):
            require_ranks(before, map_.rank_of)


@pytest.mark.parametrize("rank", [5, 12])
async def test_a_rank_that_no_slot_has_room_for_is_refused_in_a_sentence_and_nothing_is_left(
    here: Local, tmp_path: Path, anchor: Path, rank: int
) -> None:
    job = await here.add(package(tmp_path, anchor, size=ExpertSize(rank=rank)))
    assert (job.state, job.error) == (
        "failed",
        {
            "code": "package_refused",
            "message": f"No slot has room for an expert of rank {rank}. Start the server with --slots r{rank}=1 and "
            "--moe-kernels flexgate, or merge the package with 'flexgate experts merge' and serve that model.",
        },
    )
    assert "math" not in here.store.snapshot().experts
    assert not list((tmp_path / "experts").iterdir())


async def test_low_rank_experts_never_take_full_slots_and_say_which_are_taken(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    for name in ("one", "two"):
        assert (await here.add(package(tmp_path, anchor, name, size=ExpertSize(rank=2)))).state == "succeeded"
    job = await here.add(package(tmp_path, anchor, "three", size=ExpertSize(rank=1)))
    assert (job.error["code"], job.error["message"]) == (
        "slots_full",
        "All 2 slots with room for rank 1 are taken. Revoke an expert, or start the server with more of them "
        "(--slots).",
    )


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


async def test_an_unsigned_package_needs_a_server_that_says_so(here: Local, tmp_path: Path, anchor: Path) -> None:
    object.__setattr__(here.service._pool.places, "trusted_keys", TrustedKeys({}))
    job = await here.add(package(tmp_path, anchor))
    assert job.error["code"] == "package_refused"
    assert "is not signed" in job.error["message"]


async def test_a_model_that_there_are_no_packages_for_refuses_them_with_the_reason(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "olmoe"}')
    object.__setattr__(here.service._pool.places, "base", lambda: base_identity(other))
    job = await here.add(package(tmp_path, anchor))
    assert job.error == {
        "code": "package_refused",
        "message": "The served model takes no expert packages: config.json names model_type 'olmoe', "
        "expected 'flex_olmo'.",
    }


async def test_two_experts_arrive_at_the_same_time_in_slots_of_their_own(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    packages = [package(tmp_path, anchor, expert=expert) for expert in ("a", "b", "c")]
    jobs = await asyncio.gather(*(here.add(path) for path in packages))
    assert [job.state for job in jobs] == ["succeeded"] * 3
    assert sorted(job.result["slot"] for job in jobs) == [2, 3, 4]
    assert sorted(job.result["slot_epoch"] for job in jobs) == [2, 3, 4]
    assert sorted(here.client.published[-1]) == ["a", "b", "c", "news", "public"]


async def test_tidying_up_leaves_what_is_arriving_and_what_has_just_been_committed(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    pool = here.service._pool
    private = tmp_path / "experts"
    for name in ("job_1", ".job_1.abc.partial", "job_2", "job_3", "left-over"):
        (private / name).mkdir(parents=True)
    pool.arriving |= {"job_1", "job_2", "job_3"}
    added = pool.repository.added

    def two_are_committed_before_and_after_it_reads() -> tuple[Added, ...]:
        pool.arriving -= {"job_2", "job_3"}
        return (*added(), Added("math", 1, 2, 2, "job_2", "", ""))

    pool.repository.added = two_are_committed_before_and_after_it_reads  # type: ignore[method-assign]
    await (await pool.forget_copies())
    assert sorted(path.name for path in private.iterdir()) == [".job_1.abc.partial", "job_1", "job_2", "job_3"]
