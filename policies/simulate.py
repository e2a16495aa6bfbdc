"""Replay requests against a proposed policy, and say who would gain and who would lose what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flexgate.policies.decide import decide
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.errors import DecisionRefused
from flexgate.policies.ids import ExpertId
from flexgate.policies.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Replay:
    """A decision sample to replay: tenant, request, time (Unix seconds), and how many requests it stands for."""

    tenant_id: str
    request: DecisionRequest
    now: float
    times: int = 1

    @property
    def key(self) -> tuple[object, ...]:
        """What distinguishes it from others."""
        request = self.request
        return self.tenant_id, request.purpose, request.region, request.only, request.ignore


@dataclass(frozen=True, slots=True)
class Difference:
    """What a proposal would change for one request. Refusals name the error, or are None."""

    replay: Replay
    gained: tuple[ExpertId, ...]
    lost: tuple[ExpertId, ...]
    refused_before: str | None
    refused_after: str | None


def simulate(before: Snapshot, after: Snapshot, replays: Iterable[Replay]) -> list[Difference]:
    """The requests that would be answered differently, in their order.

    A request that is refused counts as getting nothing.
    """
    differences = []
    for replay in replays:
        had, refused_before = _outcome(before, replay)
        gets, refused_after = _outcome(after, replay)
        if set(had) != set(gets) or refused_before != refused_after:
            gained = tuple(expert for expert in gets if expert not in had)
            lost = tuple(expert for expert in had if expert not in gets)
            differences.append(Difference(replay, gained, lost, refused_before, refused_after))
    return differences


def with_standard(samples: Iterable[Replay], before: Snapshot, after: Snapshot, now: float) -> list[Replay]:
    """`samples`, and what an active tenant of either may request without a filter."""
    by_key = {replay.key: replay for snapshot in (before, after) for replay in _standard(snapshot, now)}
    by_key.update({replay.key: replay for replay in samples})
    return list(by_key.values())


def _standard(snapshot: Snapshot, now: float) -> Iterator[Replay]:
    for tenant in snapshot.tenants.values():
        if tenant.archived:
            continue
        for purpose in (None, *sorted(tenant.purposes)):
            for region in (None, *sorted(tenant.regions)):
                request = DecisionRequest(decision_id="simulate", purpose=purpose, region=region)
                yield Replay(tenant.id, request, now, times=0)


def _outcome(snapshot: Snapshot, replay: Replay) -> tuple[tuple[ExpertId, ...], str | None]:
    try:
        decision = decide(snapshot, replay.tenant_id, replay.request, replay.now)
    except DecisionRefused as error:
        return (), type(error).__name__
    return decision.allowed, None
