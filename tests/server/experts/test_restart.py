"""What a restart loads again: what was added and is still trusted, and nothing that was revoked."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from slotkit.local import CHECKPOINT, MERGED, Local, local, package, zeros

from flexgate.experts.package.signature import TrustedKeys
from flexgate.policies.store.store import Store
from flexgate.server.experts.errors import NotLoaded, PackageRefused
from flexgate.server.experts.restore import at_start

pytestmark = pytest.mark.asyncio


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
    await asyncio.gather(*again.service._pool._removing)
    assert list((tmp_path / "experts").glob("job*")) == []
    assert at_start(store, CHECKPOINT, MERGED).resident == CHECKPOINT
    with pytest.raises(NotLoaded):
        await again.service.revoke("math", actor="key_owner")


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
