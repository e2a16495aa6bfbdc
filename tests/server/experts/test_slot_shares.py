"""Who gets the slots of an engine: full ones are refused, and an owner has a share of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from slotkit.local import Local, package

pytestmark = pytest.mark.asyncio


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
