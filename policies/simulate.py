"""Replay requests against a proposed policy, and say who would gain and who would lose what."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flexgate.policies.decide import decide
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.errors import DecisionRefused
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.terms import ExpertId


@dataclass(frozen=True, slots=True)
class Replay:
    """One recorded request: who asked what, when (Unix seconds)."""

    tenant_id: str
    request: DecisionRequest
    now: float


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


def _outcome(snapshot: Snapshot, replay: Replay) -> tuple[tuple[ExpertId, ...], str | None]:
    try:
        decision = decide(snapshot, replay.tenant_id, replay.request, replay.now)
    except DecisionRefused as error:
        return (), type(error).__name__
    return decision.allowed, None
