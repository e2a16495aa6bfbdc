"""What a newer policy does to the requests that run: they end with their right, and nothing else ends them."""

from __future__ import annotations

import asyncio
import hashlib
import math
import threading
from functools import partial, reduce
from types import SimpleNamespace
from typing import Any

import pytest

from flexgate.policies.agreements import Agreement
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.documents import Expert, KeyRecord, Role, Tenant
from flexgate.policies.ids import TenantId
from flexgate.policies.snapshot import Snapshot
from flexgate.server.engine.frontend.calls import ExpertSlotRef, GatedCall
from flexgate.server.http.auth import authenticate
from flexgate.server.inference import enforcement
from flexgate.server.inference.enforcement import Right, RunningRequests
from flexgate.server.policy.source import PolicySource

NOW = 1000.0


class Engine:
    """Notes what is stopped, as the client of the engine does."""

    def stop(self, call: GatedCall, reason: str) -> None:
        call.failed = call.failed or reason
        call.ended.set()

    def end_at(self, call: GatedCall, valid_until: float, reason: str) -> None:
        call.end_at(valid_until, reason)


def policy(
    version: int = 2,
    *,
    permitted: bool = True,
    not_after: str | None = None,
    live: bool = True,
    key: dict[str, Any] | None = None,
    keys: bool = True,
    required: str | None = None,
    **tenant: Any,
) -> Snapshot:
    """Project t may use news, as far as nothing else is said."""
    terms = {"id": "a", "owner": "gazette", "experts": ["news"], "assignee": "tenant:t", "effect": "permit"}
    agreement = Agreement.model_validate(terms | ({"not_after": not_after} if not_after else {}))
    requirement = Agreement.model_validate({**terms, "id": "r", "effect": "require", "not_before": required})
    record = {"key_id": "k", "prefix": "sk", "created": 0.0, "tenant_id": TenantId("t")} | (key or {})
    record |= {"sha256": hashlib.sha256(b"sk-t").digest(), "role": Role.TENANT}
    return Snapshot.build(
        policy_version=version,
        experts=[Expert(id="public", owner="commons"), Expert(id="news", owner="gazette", live=live)],
        tenants=[Tenant(**{"id": "t", "name": "t", "expert_ids": frozenset({"news"})} | tenant)],
        agreements=[*([agreement] if permitted else []), *([requirement] if required else [])],
        keys=[KeyRecord(**record)] if keys else [],
    )


def right(*experts: str, only: tuple[str, ...] | None = None, **options: Any) -> Right:
    """A request that was admitted under version 1."""
    snapshot = policy(1, **options)
    refs = tuple(ExpertSlotRef(expert, slot, 1) for slot, expert in enumerate(("public", *experts)))
    principal = authenticate(snapshot, "Bearer sk-t", 0.5)
    call, asked = GatedCall("t", refs, math.inf), DecisionRequest(decision_id="d", only=only)
    return Right(call, principal, TenantId("t"), asked, 1)


def watching(engine: Any = None, **options: Any) -> RunningRequests:
    """What watches running requests; no newer policy was read, unless `newest` says so."""
    newest, withheld = options.pop("newest", None), options.pop("withheld", ())
    read: Any = SimpleNamespace(
        stored=newest, withheld=withheld, without_withheld=partial(reduce, lambda kept, taken: taken(kept), withheld)
    )
    return RunningRequests(engine or Engine(), clock=lambda: NOW, policy=read, **options)


def after(right_: Right, snapshot: Snapshot, **options: Any) -> str | None:
    """Why a newer policy ends a running request, or None."""
    running = watching(**options)
    running.begin(right_)
    running.enforce(snapshot)
    return right_.call.failed


LOST = {
    "agreement": ({"permitted": False}, "permission_ended"),
    "agreement in the past": ({"not_after": "1970-01-01T00:10:00Z"}, "permission_ended"),
    "permission": ({"expert_ids": frozenset()}, "permission_ended"),
    "expert": ({"live": False}, "expert_revoked"),
    "key": ({"key": {"revoked": 999.0}}, "key_revoked"),
    "key removed": ({"keys": False}, "key_revoked"),
    "project": ({"archived": True}, "project_archived"),
}


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("only", [None, ("news",)])
def test_a_running_request_ends_with_its_right(lost: str, only: tuple[str, ...] | None) -> None:
    change, reason = LOST[lost]
    assert after(right("news", only=only), policy(**change)) == reason


def test_a_change_that_takes_nothing_of_it_ends_no_request() -> None:
    assert after(right("news"), policy(name="renamed")) is None
    assert after(right(), policy(permitted=False)) is None
    assert after(right("news"), policy(not_after="2099-01-01T00:00:00Z")) is None


def test_what_is_required_from_now_on_ends_the_requests_that_run_without_it() -> None:
    now = "1970-01-01T00:16:40Z"
    for without in (right(), right(only=())):
        assert after(without, policy(required=now)) == "permission_ended"
    assert after(right("news"), policy(required=now)) is None
    assert after(right("news"), policy(required=now, permitted=False)) == "permission_ended"


@pytest.mark.parametrize("only", [None, ()])
def test_what_will_be_required_ends_the_requests_that_run_without_it_then(only: tuple[str, ...] | None) -> None:
    """Also where the newer policy would give them the expert: they run without it all the same."""
    for running_right, end in ((right(only=only), 1200.0), (right("news"), math.inf)):
        assert after(running_right, policy(required="1970-01-01T00:20:00Z")) is None
        assert running_right.call.valid_until == end


def test_requests_of_a_revoked_key_finish_where_the_operator_says_so() -> None:
    revoked = policy(key={"revoked": 999.0})
    assert after(right("news"), revoked, revoked_keys="finish") is None
    assert after(right("news"), policy(archived=True), revoked_keys="finish") == "project_archived"


def test_an_end_that_is_brought_forward_holds_for_the_request_that_runs() -> None:
    running_right = right("news")
    assert after(running_right, policy(not_after="1970-01-01T00:20:00Z")) is None
    assert (running_right.call.valid_until, running_right.call.expired) == (1200.0, "permission_ended")


def test_a_request_ends_when_its_key_expires() -> None:
    running_right = right("news", key={"expires": 2000.0})
    after(running_right, policy(key={"expires": 2000.0}))
    assert (running_right.call.valid_until, running_right.call.expired) == (2000.0, "key_expired")


def test_a_request_that_begins_after_its_right_has_gone_ends_at_once() -> None:
    running = watching(newest=policy(permitted=False))
    running_right = right("news")
    running.begin(running_right)
    assert running_right.call.failed == "permission_ended"


def test_every_running_request_ends_when_nothing_confirms_the_policy_any_more() -> None:
    running = watching()
    rights = [right("news"), right(), right("news")]
    for one in rights:
        running.begin(one)
    rights[2].call.failed = "key_revoked"
    running.expire()
    assert [one.call.failed for one in rights] == ["policy_unavailable", "policy_unavailable", "key_revoked"]


def test_a_right_that_is_withheld_ends_a_request_that_begins_under_the_same_version() -> None:
    running = watching(newest=policy(1), withheld=(lambda _: policy(1, permitted=False),))
    running_right = right("news")
    running.begin(running_right)
    assert running_right.call.failed == "permission_ended"


def test_a_request_that_has_ended_is_watched_no_longer() -> None:
    running = watching()
    running_right = right("news")
    running.begin(running_right)
    running.end(running_right.call)
    running.enforce(policy(permitted=False))
    assert running_right.call.failed is None


def test_the_replicas_are_told_once_the_running_requests_have_ended() -> None:
    told: list[Any] = []
    store = SimpleNamespace(confirm=lambda known: policy(1 if known is None else 2))
    replicas: Any = SimpleNamespace(announce=lambda version: told.append(version))
    source = PolicySource(store, lambda: {"public": 1, "news": 1}, lease_s=2.0, poll_s=1.0, replicas=replicas)
    source.enforce_with(lambda snapshot: told.append(("enforced", snapshot.policy_version)))
    source.confirm()
    source.confirm()
    assert told == [0, ("enforced", 1), 1, ("enforced", 2), 2]


def test_a_policy_whose_enforcement_failed_is_enforced_at_the_next_poll_and_told_to_nobody_before() -> None:
    told: list[Any] = []
    snapshots = [policy(1), policy(2)]
    store = SimpleNamespace(confirm=lambda known: known if known and len(told) > 3 else snapshots.pop(0))
    replicas: Any = SimpleNamespace(announce=lambda version: told.append(version))
    source = PolicySource(store, lambda: {"public": 1, "news": 1}, lease_s=2.0, poll_s=1.0, replicas=replicas)

    def enforce(snapshot: Snapshot) -> None:
        told.append(("enforced", snapshot.policy_version))
        if told.count(told[-1]) == 1 and snapshot.policy_version == 2:
            raise MemoryError

    source.enforce_with(enforce)
    source.confirm()
    with pytest.raises(MemoryError):
        source.confirm()
    source.confirm()
    source.confirm()
    assert told == [0, ("enforced", 1), 1, ("enforced", 2), ("enforced", 2), 2, 2]


def test_a_request_that_cannot_be_judged_ends_and_keeps_no_other_from_being_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decide = enforcement.decide

    def fail_for_one(snapshot: Snapshot, tenant: TenantId, request: DecisionRequest, now: float) -> Any:
        if request.only:
            raise KeyError("broken")
        return decide(snapshot, tenant, request, now)

    running = watching()
    broken, lost, kept = right("news", only=("news",)), right("news"), right()
    for each in (broken, lost, kept):
        running.begin(each)
    monkeypatch.setattr(enforcement, "decide", fail_for_one)
    running.enforce(policy(permitted=False))
    assert [each.call.failed for each in (broken, lost, kept)] == ["permission_ended", "permission_ended", None]


@pytest.mark.asyncio
async def test_enforcing_waits_for_the_end_and_no_longer_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enforcement, "END_SECONDS", 60.0)
    stopped = threading.Event()
    engine: Any = SimpleNamespace(stop=lambda call, reason: stopped.set())
    running, running_right = watching(engine), right("news")
    running.begin(running_right)
    enforcing = asyncio.create_task(asyncio.to_thread(running.enforce, policy(permitted=False)))
    assert await asyncio.to_thread(stopped.wait, 30)
    assert not enforcing.done()
    running_right.call.ended.set()
    await enforcing
    monkeypatch.setattr(enforcement, "END_SECONDS", 0.0)
    late = right("news")
    running.begin(late)
    await asyncio.to_thread(running.enforce, policy(permitted=False))
    assert not late.call.ended.is_set()


@pytest.mark.asyncio
async def test_a_request_that_was_ended_and_is_not_read_holds_up_no_later_policy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    waited: list[Any] = []
    monkeypatch.setattr(enforcement, "_wait_for", waited.append)
    running, unread = (
        watching(SimpleNamespace(stop=lambda call, reason: setattr(call, "failed", reason))),
        right("news"),
    )
    running.begin(unread)
    for version in (2, 3, 4):
        await asyncio.to_thread(running.enforce, policy(version, permitted=False))
    assert waited == [[unread.call]]
    assert len([record for record in caplog.records if ": 1 running requests lost" in record.message]) == 1
