"""The snapshot that decisions are made from."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from clocks import Clock

from flexgate.policies.errors import SnapshotStale, StoreUnavailable, VersionNotReached
from flexgate.policies.ids import ExpertId
from flexgate.policies.snapshot import Snapshot
from flexgate.server.policy.live import with_live
from flexgate.server.policy.source import PolicySource


@pytest.fixture
def live() -> dict[str, int]:
    return dict.fromkeys(("public", "news", "math", "secret"), 1)


@pytest.fixture
def source(store: Any, clock: Clock, live: dict[str, int]) -> PolicySource:
    return PolicySource(store, lambda: dict(live), lease_s=2.0, poll_s=0.01, clock=clock)


async def reach(source: PolicySource, version: int) -> None:
    """Wait until decisions are made from a version."""
    async with asyncio.timeout(30):
        while (await source.current()).policy_version != version:
            await asyncio.sleep(0.001)


@pytest.mark.asyncio
async def test_a_confirmed_snapshot_is_used_without_asking(source: PolicySource, store: Any) -> None:
    source.confirm()
    asked = store.asked
    assert (await source.current()).policy_version == 7
    assert store.asked == asked


@pytest.mark.asyncio
async def test_a_stale_snapshot_is_confirmed_by_the_request(
    source: PolicySource, store: Any, clock: Clock, snapshot: Snapshot
) -> None:
    source.confirm()
    store.answer = replace(snapshot, policy_version=8)
    clock.now = 2.0
    assert not source.fresh()
    assert (await source.current()).policy_version == 8


@pytest.mark.asyncio
async def test_a_stale_snapshot_is_never_used_when_the_store_fails(
    source: PolicySource, store: Any, clock: Clock
) -> None:
    source.confirm()
    store.answer = StoreUnavailable("locked")
    clock.now = 1.99
    assert (await source.current()).policy_version == 7
    clock.now = 2.0
    with pytest.raises(SnapshotStale):
        await source.current()


@pytest.mark.asyncio
async def test_without_a_first_snapshot_nothing_is_decided(source: PolicySource, store: Any) -> None:
    store.answer = StoreUnavailable("gone")
    with pytest.raises(SnapshotStale):
        await source.current()


@pytest.mark.asyncio
async def test_polling_swaps_a_new_version_in_and_survives_failures(
    source: PolicySource, store: Any, snapshot: Snapshot
) -> None:
    task = asyncio.create_task(source.run())
    try:
        await reach(source, 7)
        store.answer = StoreUnavailable("locked")
        failures = store.asked + 2
        async with asyncio.timeout(30):
            while store.asked < failures:
                await asyncio.sleep(0.001)
        store.answer = replace(snapshot, policy_version=9)
        await reach(source, 9)
    finally:
        task.cancel()


class Given:
    """ChangeNotifications that a test gives, or loses."""

    def __init__(self) -> None:
        self.given = threading.Event()

    def wait(self, seconds: float) -> None:
        self.given.wait(seconds)
        self.given.clear()

    def close(self) -> None:
        self.given.set()


@pytest.mark.asyncio
async def test_a_notification_brings_a_change_before_the_next_poll(store: Any, snapshot: Snapshot) -> None:
    notifications = Given()
    source = PolicySource(store, dict, lease_s=60.0, poll_s=30.0, notifications=notifications)
    task = asyncio.create_task(source.run())
    try:
        while not source.fresh():
            await asyncio.sleep(0.01)
        store.answer = replace(snapshot, policy_version=9)
        assert (await source.current()).policy_version == 7
        notifications.given.set()
        async with asyncio.timeout(10):
            while (await source.current()).policy_version != 9:
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
        notifications.close()


@pytest.mark.asyncio
async def test_a_change_comes_with_the_poll_when_every_notification_is_lost(store: Any, snapshot: Snapshot) -> None:
    notifications = Given()
    source = PolicySource(store, dict, lease_s=60.0, poll_s=0.05, notifications=notifications)
    task = asyncio.create_task(source.run())
    try:
        await reach(source, 7)
        store.answer = replace(snapshot, policy_version=9)
        await reach(source, 9)
    finally:
        task.cancel()
        notifications.close()


@pytest.mark.asyncio
async def test_a_slow_answer_never_replaces_a_newer_snapshot(snapshot: Snapshot, clock: Clock) -> None:
    asked, go_on = threading.Event(), threading.Event()

    class Slow:
        answer = snapshot

        def confirm(self, known: Snapshot | None) -> Snapshot:
            answer = self.answer
            if not asked.is_set():
                asked.set()
                go_on.wait(5)
            return answer

    store = Slow()
    source = PolicySource(store, dict, lease_s=2.0, poll_s=0.01, clock=clock)
    first = asyncio.create_task(asyncio.to_thread(source.confirm))
    await asyncio.to_thread(asked.wait, 5)
    store.answer = replace(snapshot, policy_version=8)
    second = asyncio.create_task(asyncio.to_thread(source.confirm))
    await asyncio.sleep(0.05)
    go_on.set()
    await asyncio.gather(first, second)
    assert (await source.current()).policy_version == 8


@pytest.mark.asyncio
async def test_a_store_that_hangs_fails_closed_and_holds_one_thread(snapshot: Snapshot) -> None:
    hanging, go_on = threading.Event(), threading.Event()
    asked = 0

    class Hanging:
        def confirm(self, known: Snapshot | None) -> Snapshot:
            nonlocal asked
            asked += 1
            if hanging.is_set():
                go_on.wait(60)
            return snapshot

    source = PolicySource(Hanging(), dict, lease_s=0.2, poll_s=0.01)
    polling = asyncio.create_task(source.run())
    try:
        await asyncio.sleep(0.05)
        assert (await source.current()).policy_version == 7
        hanging.set()
        await asyncio.sleep(0.25)
        before = asked
        answers = await asyncio.wait_for(
            asyncio.gather(*(source.current() for _ in range(50)), return_exceptions=True), 20
        )
        assert all(isinstance(answer, SnapshotStale) for answer in answers)
        assert asked == before
        hanging.clear()
        go_on.set()
        await asyncio.sleep(0.05)
        assert (await source.current()).policy_version == 7
    finally:
        polling.cancel()


@pytest.mark.asyncio
async def test_a_wanted_version_is_waited_for(
    source: PolicySource, store: Any, clock: Clock, snapshot: Snapshot
) -> None:
    source.confirm()

    async def arrive() -> None:
        await asyncio.sleep(0.03)
        store.answer = replace(snapshot, policy_version=8)
        source.confirm()

    arriving = asyncio.create_task(arrive())
    assert (await source.at_least(8)).policy_version == 8
    await arriving


@pytest.mark.asyncio
async def test_a_version_that_does_not_arrive_is_given_up(store: Any) -> None:
    source = PolicySource(store, dict, lease_s=2.0, poll_s=0.01)
    with pytest.raises(VersionNotReached, match="version 99"):
        await source.at_least(99)


@pytest.mark.asyncio
async def test_what_the_engine_serves_overrides_the_catalogue(source: PolicySource, live: dict[str, int]) -> None:
    del live["news"]
    assert not source.confirm().experts[ExpertId("news")].live
    snapshot = await source.current()
    assert [e.id for e in snapshot.experts.values() if not e.live] == ["news"]
    live["news"] = 1
    assert all(e.live for e in (await source.current()).experts.values())


@pytest.mark.asyncio
async def test_an_unchanged_world_keeps_one_snapshot_object(source: PolicySource) -> None:
    """Decision caches are kept per object."""
    source.confirm()
    assert await source.current() is await source.current()


def test_liveness_is_all_that_changes(snapshot: Snapshot) -> None:
    served = with_live(snapshot, {"public": 1})
    assert served.keys is snapshot.keys
    assert [e.id for e in served.experts.values()] == [e.id for e in snapshot.experts.values()]


@pytest.mark.asyncio
@pytest.mark.parametrize("error", [StoreUnavailable("away"), OSError("away")])
async def test_what_runs_is_ended_once_the_lease_of_a_lost_store_has_run_out(
    source: PolicySource, store: Any, clock: Clock, snapshot: Snapshot, error: Exception
) -> None:
    expired = asyncio.Event()
    source.expire_with(expired.set)
    source.confirm()
    watching = asyncio.create_task(source.watch_lease())
    store.answer = error
    clock.now = 1.99
    asked = store.asked
    await asyncio.sleep(0.05)
    assert (expired.is_set(), store.asked) == (False, asked)
    clock.now = 2.0
    async with asyncio.timeout(10):
        await expired.wait()
    store.answer = snapshot
    async with asyncio.timeout(10):
        while not source.fresh():
            await asyncio.sleep(0.001)
    assert not watching.done()
    watching.cancel()


@pytest.mark.asyncio
async def test_what_runs_is_ended_though_the_store_never_answers(snapshot: Snapshot, clock: Clock) -> None:
    go, expired = threading.Event(), asyncio.Event()
    store: Any = SimpleNamespace(confirm=lambda known: snapshot if known is None else (go.wait(30), snapshot)[1])
    source = PolicySource(store, lambda: {"public": 1}, lease_s=2.0, poll_s=0.01, clock=clock)
    source.expire_with(expired.set)
    source.confirm()
    clock.now = 2.0
    watching = asyncio.create_task(source.watch_lease())
    async with asyncio.timeout(10):
        await expired.wait()
    watching.cancel()
    go.set()


@pytest.mark.asyncio
async def test_an_event_loop_that_was_held_up_ends_nothing(source: PolicySource, clock: Clock) -> None:
    expired: list[bool] = []
    source.expire_with(lambda: expired.append(True))
    source.confirm()
    watching = asyncio.create_task(source.watch_lease())
    for _ in range(20):
        clock.now += 60.0
        async with asyncio.timeout(10):
            while not source.fresh():
                await asyncio.sleep(0.001)
    watching.cancel()
    assert not expired


@pytest.mark.asyncio
async def test_the_policy_stays_confirmed_while_the_loop_and_all_other_threads_are_busy(store: Any) -> None:
    source, done = PolicySource(store, dict, lease_s=0.5, poll_s=0.01), threading.Event()
    others = [asyncio.create_task(asyncio.to_thread(done.wait, 20)) for _ in range(64)]
    await asyncio.sleep(0)
    polling = asyncio.create_task(source.run())
    await asyncio.sleep(0)
    time.sleep(1.0)
    assert source.fresh()
    done.set()
    polling.cancel()
    await asyncio.gather(polling, *others, return_exceptions=True)


@pytest.mark.asyncio
async def test_who_changes_the_policy_waits_for_a_store_that_answers_too_late(
    source: PolicySource, store: Any, clock: Clock
) -> None:
    def late(_known: Snapshot | None, plain: Any = store.confirm) -> Any:
        clock.now += 5.0 if store.asked < 3 else 0.1
        return plain(None)

    store.confirm = late
    with pytest.raises(SnapshotStale):
        await source.current()
    assert (await source.current(20.0)).policy_version == 7
    assert store.asked == 4
