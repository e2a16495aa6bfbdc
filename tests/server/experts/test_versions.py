"""A checkpoint and an added package that hold the same expert: the newer version is served, and never both."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from packagekit import make_package
from slotkit.local import CHECKPOINT, MERGED, Local, local

from flexgate.experts.errors import LayoutError
from flexgate.policies.store.catalogue import ManifestExpert
from flexgate.policies.store.store import Store
from flexgate.server.experts.errors import PackageRefused
from flexgate.server.experts.restore import AtStart, at_start
from flexgate.server.experts.versions import merged_versions


class Place:
    """One server's store and files, which outlive it."""

    def __init__(self, store: Store, anchor: Path, directory: Path) -> None:
        self.store, self.anchor, self.directory = store, anchor, directory

    def serve(self, news: int) -> Local:
        """A server whose checkpoint holds that version of `news`; 0 where it does not say."""
        return local(self.store, self.anchor, self.directory, merged={**MERGED, "news": news})

    async def restart(self, news: int) -> tuple[AtStart, Local]:
        merged = {**MERGED, "news": news}
        state = at_start(self.store, CHECKPOINT, merged)
        here = local(self.store, self.anchor, self.directory, without=state.without, epoch=state.epoch, merged=merged)
        await here.service.restore(lambda *_: None)
        return state, here

    async def add(self, here: Local, version: int, *, expert: str = "news", owner: str = "gazette") -> Any:
        """Add an expert in a version of its own weights; the ended job."""
        target = self.directory / f"package-{version}-{len(list(self.directory.iterdir()))}"
        make_package(target, self.anchor, expert=expert, owner=owner, version=version, seed=version)
        return await here.add(target)


@pytest.fixture
def place(store: Store, anchor: Path, tmp_path: Path) -> Place:
    return Place(store, anchor, tmp_path)


def news_slot_epoch(here: Local) -> list[int]:
    """The start's epoch is the checkpoint's; one entry, or it is served twice."""
    return [info.slot_epoch for info in here.client.experts() if info.id == "news"]


@pytest.mark.asyncio
async def test_a_newer_version_in_the_checkpoint_is_served_and_the_package_set_aside(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    assert (await place.add(place.serve(news=1), 2)).state == "succeeded"
    logger = "flexgate.server.experts.restore"
    with caplog.at_level(logging.WARNING, logger):
        state, here = await place.restart(news=3)
    assert state.set_aside == ("added package news version 2: the checkpoint's version 3 is newer and is served",)
    told = [record.getMessage() for record in caplog.records if record.name == logger]
    assert told == [f"set aside: {state.set_aside[0]}"]
    assert state.without == frozenset()
    assert [expert.id for expert in state.resident] == ["public", "news"]
    assert state.least_slots == 0
    assert news_slot_epoch(here) == [2]
    assert here.slots.digests(2) == here.slots.digests(4)


@pytest.mark.asyncio
@pytest.mark.parametrize("merged", [1, 2])
async def test_a_package_that_is_as_new_as_the_checkpoint_stays(place: Place, merged: int) -> None:
    job = await place.add(place.serve(news=1), 2)
    state, here = await place.restart(news=merged)
    assert state.set_aside == ()
    assert state.without == {"news"}
    assert news_slot_epoch(here) == [job.result["slot_epoch"]]
    assert here.slots.digests(2) == job.result["digests"]


@pytest.mark.asyncio
async def test_a_version_that_was_revoked_to_go_back_to_an_older_one_does_not_return(place: Place) -> None:
    here = place.serve(news=5)
    await here.service.revoke("news", actor="key_owner")
    assert (await place.add(here, 4)).state == "succeeded"
    state, again = await place.restart(news=5)
    assert (state.set_aside, state.without) == ((), {"news"})
    assert news_slot_epoch(again) == [3]
    state, again = await place.restart(news=6)
    assert len(state.set_aside) == 1
    assert news_slot_epoch(again) == [3]


@pytest.mark.asyncio
async def test_a_checkpoint_that_changed_and_names_no_version_stops_the_start(place: Place) -> None:
    await place.add(place.serve(news=1), 2)
    with pytest.raises(PackageRefused) as refused:
        await place.restart(news=0)
    assert str(refused.value) == (
        "expert 'news' was added in version 2 and is in the checkpoint, which names no version of it: "
        'give its entry in flexgate.json a "version", or start with the former checkpoint and revoke the added expert'
    )


@pytest.mark.asyncio
async def test_a_checkpoint_that_never_named_a_version_comes_back_as_it_was_left(place: Place) -> None:
    here = place.serve(news=0)
    job = await place.add(here, 9)
    assert job.error == {
        "code": "expert_version_unknown",
        "message": "Expert 'news' is loaded from the checkpoint, which names no version of it. "
        "Revoke it before adding a package.",
    }
    await here.service.revoke("news", actor="key_owner")
    assert (await place.add(here, 9)).state == "succeeded"
    _, again = await place.restart(news=0)
    assert news_slot_epoch(again) == [3]


@pytest.mark.asyncio
async def test_a_package_replaces_only_an_older_version_of_the_checkpoint(place: Place) -> None:
    await place.add(place.serve(news=1), 2)
    _, here = await place.restart(news=3)
    for version in (2, 3):
        job = await place.add(here, version)
        assert job.error == {
            "code": "expert_version_not_newer",
            "message": "Expert 'news' is loaded in version 3. Add a package with a higher version.",
        }
    assert (await place.add(here, 4)).state == "succeeded"
    state, again = await place.restart(news=3)
    assert (state.set_aside, news_slot_epoch(again)) == ((), [3])


@pytest.mark.asyncio
@pytest.mark.parametrize("merged", [0, 5, 6])
async def test_a_package_of_a_store_that_did_not_record_the_checkpoints_version_stays(
    place: Place, merged: int
) -> None:
    here = place.serve(news=5)
    await here.service.revoke("news", actor="key_owner")
    job = await place.add(here, 4)
    (row,) = place.store.weights().added
    former = {key: said for key, said in row.detail.items() if key != "merged_version"}
    with place.store.change(actor="key_owner", note="add expert news", at=2.0) as change:
        change.add_weights("news", slot=row.slot, package=job.id, detail=former)
    state, again = await place.restart(news=merged)
    assert (state.set_aside, state.without) == ((), {"news"})
    assert news_slot_epoch(again) == [4]
    assert again.slots.digests(row.slot) == job.result["digests"]


def write_manifest(directory: Path, **news: Any) -> None:
    entries = [{"id": "public"}, {"id": "news", **news}]
    (directory / "flexgate.json").write_text(json.dumps({"experts": entries}))


def test_versions_come_from_the_manifest_or_the_package_that_was_merged(tmp_path: Path, anchor: Path) -> None:
    assert merged_versions(tmp_path, ["public", "expert-1"]) == {"public": 0, "expert-1": 0}
    write_manifest(tmp_path)
    assert merged_versions(tmp_path, ["public", "news"]) == {"public": 0, "news": 0}
    write_manifest(tmp_path, version=7)
    assert merged_versions(tmp_path, ["public", "news"]) == {"public": 0, "news": 7}
    make_package(tmp_path / "package", anchor, expert="news", version=3)
    (tmp_path / "provenance").mkdir()
    (tmp_path / "package" / "manifest.json").rename(tmp_path / "provenance" / "news.json")
    with pytest.raises(LayoutError, match=r"flexgate.json names version 7 of 'news', its provenance version 3"):
        merged_versions(tmp_path, ["public", "news"])
    write_manifest(tmp_path)
    assert merged_versions(tmp_path, ["public", "news"]) == {"public": 0, "news": 3}


@pytest.mark.parametrize("version", [-1, True, "2", 1.0, None])
def test_a_version_that_is_no_number_is_refused(tmp_path: Path, version: object) -> None:
    write_manifest(tmp_path, version=version)
    with pytest.raises(LayoutError, match="the version of 'news' must be a whole number from 1"):
        merged_versions(tmp_path, ["public", "news"])


@pytest.mark.asyncio
async def test_a_slot_that_a_later_checkpoint_needs_is_refused_in_words(place: Place) -> None:
    job = await place.add(place.serve(news=1), 2)
    assert job.result["slot"] == len(CHECKPOINT)
    longer = (*CHECKPOINT, ManifestExpert("math", "academy", "math"))
    with pytest.raises(PackageRefused, match="'news' has slot 2, which this checkpoint needs for 'math'"):
        at_start(place.store, longer, {**MERGED, "news": 1, "math": 1})


@pytest.mark.asyncio
async def test_the_slot_of_a_package_that_was_set_aside_is_not_given_away(place: Place) -> None:
    news = await place.add(place.serve(news=1), 2)
    _, here = await place.restart(news=3)
    math = await place.add(here, 1, expert="math", owner="academy")
    assert (news.result["slot"], math.result["slot"]) == (2, 3)
    _, former = await place.restart(news=1)
    assert news_slot_epoch(former) == [news.result["slot_epoch"]]
    assert [info.id for info in former.client.experts()] == ["public", "news", "math"]


@pytest.mark.asyncio
async def test_a_package_that_was_set_aside_keeps_no_slot_from_its_successor_nor_after_its_revocation(
    place: Place,
) -> None:
    await place.add(place.serve(news=1), 2)
    _, here = await place.restart(news=3)
    assert (await place.add(here, 4)).result["slot"] == 2
    _, here = await place.restart(news=5)
    await here.service.revoke("news", actor="key_owner")
    job = await place.add(here, 1, expert="math", owner="academy")
    await here.service.revoke("math", actor="key_owner")
    assert job.result["slot"] == 1
    jobs = [await place.add(here, 1, expert=name, owner="academy") for name in ("a", "b", "c", "d")]
    assert [job.result["slot"] for job in jobs] == [1, 2, 3, 4]


@pytest.mark.asyncio
async def test_two_packages_that_were_added_into_one_slot_are_refused_in_words(place: Place) -> None:
    """As a server wrote it that gave the slot of a package away that it had set aside."""
    job = await place.add(place.serve(news=1), 2)
    detail = {"version": 1, "weights_digest": "", "base_digest": "", "merged_version": None}
    with place.store.change(actor="key_owner", note="add expert math", at=2.0) as change:
        change.add_weights("math", slot=job.result["slot"], package="job_math", detail=detail)
    assert at_start(place.store, CHECKPOINT, {**MERGED, "news": 3}).least_slots == 3
    with pytest.raises(PackageRefused) as refused:
        at_start(place.store, CHECKPOINT, MERGED)
    assert str(refused.value) == (
        "two added experts have slot 2, 'news' and later 'math': start with the checkpoint that was served when "
        "'math' was added, revoke it, then start with this checkpoint and add it"
    )
