"""A database that breaks off in a change: what was committed stays, and what nobody knows is given to nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from slotkit.local import Local, package, revoked_in, zeros

from flexgate.policies.errors import StoreUnavailable
from flexgate.server.engine.core.scheduler import EXPERT_REVOKED
from flexgate.server.engine.frontend.calls import ExpertSlotRef, GatedCall
from flexgate.server.experts.errors import NotStored

pytestmark = pytest.mark.asyncio


@contextmanager
def answer_lost(here: Local) -> Iterator[None]:
    """An addition is committed, its answer lost, and the store cannot be asked what it holds."""
    repository = here.service._pool.repository
    added, commit = repository.added, repository.add

    def away() -> Any:
        raise StoreUnavailable("away")

    def lost(*args: Any, **kwargs: Any) -> None:
        commit(*args, **kwargs)
        repository.added = away  # type: ignore[method-assign]
        raise StoreUnavailable("the answer was lost")

    repository.add = lost  # type: ignore[method-assign]
    yield
    repository.added, repository.add = added, commit  # type: ignore[method-assign]


async def test_what_was_committed_is_not_undone_when_the_policy_cannot_be_confirmed(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    def fail() -> None:
        raise StoreUnavailable("away")

    here.service._loader._confirm = fail
    job = await here.add(package(tmp_path, anchor))
    assert job.state == "succeeded"
    assert here.client.published[-1] == ("public", "news", "math")
    assert (tmp_path / "experts" / job.id / "manifest.json").is_file()


async def test_an_add_whose_commit_was_made_and_not_answered_is_not_undone(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    repository = here.service._pool.repository
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
    repository = here.service._pool.repository
    added = repository.added

    def broken(*_: Any, **__: Any) -> Any:
        raise StoreUnavailable("away")

    def breaks_off(*_: Any, **__: Any) -> None:
        repository.added = broken  # type: ignore[method-assign]
        raise StoreUnavailable("away")

    repository.add = breaks_off  # type: ignore[method-assign]
    said = "Lost the database connection: away. It is unknown whether the change was committed. "
    job = await here.add(package(tmp_path, anchor))
    assert job.error == {
        "code": "commit_unknown",
        "message": f"{said}The expert is not in use. Restart the server, which loads it if it was "
        "stored, or add it again.",
    }
    repository.added = added  # type: ignore[method-assign]
    job = await here.add(package(tmp_path, anchor, expert="news", owner="gazette", version=2))
    assert job.error == {
        "code": "commit_unknown",
        "message": f"{said}The former version is still served. Restart the server, which loads the new one if it was "
        "stored, or add it again.",
    }
    assert [info.slot_epoch for info in here.client.experts() if info.id == "news"] == [1]


async def test_a_slot_that_an_unknown_addition_keeps_is_free_once_it_was_revoked(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    with answer_lost(here):
        assert (await here.add(package(tmp_path, anchor))).error["code"] == "commit_unknown"
    assert (await here.add(package(tmp_path, anchor, expert="code"))).result["slot"] == 3
    await here.service.revoke("math", actor="key_owner")
    assert (await here.add(package(tmp_path, anchor, expert="law"))).result["slot"] == 2


async def test_a_slot_that_an_unknown_addition_keeps_is_free_once_another_took_its_place(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    with answer_lost(here):
        assert (await here.add(package(tmp_path, anchor))).error["code"] == "commit_unknown"
    assert (await here.add(package(tmp_path, anchor))).result["slot"] == 3
    await here.service.revoke("math", actor="key_owner")
    jobs = [await here.add(package(tmp_path, anchor, expert=expert)) for expert in ("a", "b", "c")]
    assert sorted(job.result["slot"] for job in jobs if job.state == "succeeded") == [2, 3, 4]


async def test_after_a_lost_answer_the_store_is_believed_about_which_version_it_took(
    here: Local, tmp_path: Path, anchor: Path
) -> None:
    await here.add(package(tmp_path, anchor))
    with answer_lost(here):
        job = await here.add(package(tmp_path, anchor, version=2))
    assert job.error["code"] == "commit_unknown"
    assert (await here.add(package(tmp_path, anchor, version=3))).error == {
        "code": "expert_version_not_loaded",
        "message": "Version 2 of expert 'math' is stored but not loaded on this server. Restart the server.",
    }


@pytest.mark.parametrize("again", ["by whoever asked", "as the store says"])
@pytest.mark.parametrize("drain_seconds", [0.0, 0.05])
async def test_a_revocation_that_nobody_knows_to_be_committed_gives_the_expert_to_nobody(
    here: Local, tmp_path: Path, anchor: Path, drain_seconds: float, again: str
) -> None:
    repository = here.service._pool.repository
    commit, revoked = repository.revoke, repository.revoked

    def broken() -> Any:
        raise StoreUnavailable("away")

    def broken_off(*_: Any, **__: Any) -> int:
        raise StoreUnavailable("away")

    def lost(*args: Any, **kwargs: Any) -> int:
        commit(*args, **kwargs)
        repository.revoked = broken  # type: ignore[method-assign]
        raise StoreUnavailable("the answer was lost")

    await here.add(package(tmp_path, anchor))
    call = GatedCall("t", (ExpertSlotRef("math", 2, 2),), float("inf"))
    call.ended.set()
    here.client.open.append(call)
    repository.revoke = lost  # type: ignore[method-assign]
    with pytest.raises(NotStored) as unknown:
        await here.service.revoke("math", actor="key_admin", drain_seconds=drain_seconds)
    assert (unknown.value.code, str(unknown.value)) == (
        "change_not_stored",
        "The revocation could not be stored: the answer was lost. This server has stopped serving the expert, has "
        "ended the requests that could use it, and keeps trying to store the revocation. Until then other servers "
        "serve it, and a restart would load it: repair the policy database first.",
    )
    assert call.failed == EXPERT_REVOKED
    assert [info.live for info in here.client.experts()] == [True, True, False]
    repository.revoke = broken_off  # type: ignore[method-assign]
    for seconds in (0.0, 0.05):
        with pytest.raises(NotStored):
            await here.service.revoke("math", actor="key_admin", drain_seconds=seconds)
    repository.revoked = frozenset  # type: ignore[method-assign]
    for seconds in (0.0, 0.05):
        with pytest.raises(NotStored, match="away"):
            await here.service.revoke("math", actor="key_admin", drain_seconds=seconds)
    assert [info.live for info in here.client.experts()] == [True, True, False]
    repository.revoke, repository.revoked = commit, revoked  # type: ignore[method-assign]
    if again == "by whoever asked":
        assert (await here.service.revoke("math", actor="key_admin"))["expert"] == "math"
    else:
        following = asyncio.ensure_future(here.service.follow(revoked_in(here.store)))
        async with asyncio.timeout(10):
            while len(here.client.experts()) > 2 or here.service._pool.changing.locked():
                await asyncio.sleep(0.01)
        following.cancel()
    assert here.client.published[-1] == ("public", "news")
    assert here.slots.digests(2) == zeros(here)
