"""`?wait=all`: an answer only once no process decides from the older policy any more."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from flexgate.policies.documents import Tenant
from flexgate.policies.errors import StoreUnavailable
from flexgate.policies.store import Store, replicas
from flexgate.server.policy.replicas import Replicas
from flexgate.server.policy.source import PolicySource

pytestmark = pytest.mark.asyncio


def source(store: Store, lease_s: float = 30.0) -> PolicySource:
    replicas = Replicas(store.engine, lease_s=lease_s)
    found = PolicySource(store, lambda: {"public": 1}, lease_s=lease_s, poll_s=0.01, replicas=replicas)
    found.confirm()
    return found


def change(store: Store) -> int:
    with store.change(actor="test", at=2.0) as change:
        change.put(Tenant(id="new", name="new"))
    return store.version()


async def test_a_change_is_everywhere_once_every_process_confirmed_it(real_store: Store) -> None:
    here, there = source(real_store), source(real_store)
    version = change(real_store)
    here.confirm()
    waiting = asyncio.create_task(here.everywhere(version))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    there.confirm()
    await asyncio.wait_for(waiting, 2)


async def test_a_process_that_is_gone_is_waited_for_until_its_lease_has_run_out(real_store: Store) -> None:
    source(real_store, lease_s=0.5)
    here = source(real_store)
    version = change(real_store)
    here.confirm()
    began = time.monotonic()
    await asyncio.wait_for(here.everywhere(version), 5)
    assert 0.5 <= time.monotonic() - began < 3


async def test_a_deregistered_process_is_not_waited_for(real_store: Store) -> None:
    gone, here = source(real_store), source(real_store)
    gone.deregister()
    version = change(real_store)
    here.confirm()
    await asyncio.wait_for(here.everywhere(version), 2)


async def test_a_process_is_known_before_it_reads_its_first_policy(real_store: Store, monkeypatch: Any) -> None:
    seen = []
    confirm = real_store.confirm
    monkeypatch.setattr(
        real_store, "confirm", lambda known: seen.append(replicas.behind(real_store.engine, 1)) or confirm(known)
    )
    source(real_store)
    assert [process.confirmed for process in seen[0]] == [0]


async def test_a_process_that_cannot_register_decides_nothing(real_store: Store, monkeypatch: Any) -> None:
    def broken(*_: object, **__: object) -> None:
        raise StoreUnavailable("read-only")

    monkeypatch.setattr(replicas, "announce", broken)
    with pytest.raises(StoreUnavailable):
        source(real_store)


async def test_a_later_announcement_may_fail(real_store: Store, monkeypatch: Any) -> None:
    def broken(*_: object, **__: object) -> None:
        raise StoreUnavailable("read-only")

    here = source(real_store)
    version = change(real_store)
    monkeypatch.setattr(replicas, "announce", broken)
    assert here.confirm().policy_version == version
    assert [process.lease_s for process in replicas.behind(real_store.engine, version)] == [30.0]


async def test_unseen_processes_are_forgotten(real_store: Store) -> None:
    engine = real_store.engine
    replicas.announce(engine, replicas.Process("old", 1, 2.0), at=1000.0)
    replicas.announce(engine, replicas.Process("new", 1, 2.0), at=1000.0 + replicas.FORGOTTEN_AFTER_S + 1)
    assert [process.id for process in replicas.behind(engine, 2)] == ["new"]
