"""Spare repeated requests the work: finished decisions, kept for as long as they hold.

The pure function stays the authority: what is kept was computed by it, from the same snapshot
object and inside the same time slot, so a kept answer cannot differ from a computed one. One
cache per process; calls from several threads are safe, and at worst compute twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from flexgate.policies.decide import declared_context, find_tenant, narrow
from flexgate.policies.decision import AllowedExperts, Decision, DecisionRequest, Reason
from flexgate.policies.grants import grant
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.terms import TenantId
from flexgate.policies.words import Purpose, Region

_Question = tuple[str, str | None, str | None, tuple[str, ...] | None, tuple[str, ...]]
_Outcome = tuple[TenantId, int, AllowedExperts, tuple[Reason, ...], float, Purpose | None, Region | None]
MAX_ENTRIES: Final = 65_536


@dataclass(frozen=True, slots=True)
class _Kept:
    outcome: _Outcome
    since: float
    until: float


class DecisionCache:
    """`decide` with a memory. A new snapshot, or a full memory, starts an empty one."""

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._memory: tuple[Snapshot | None, dict[_Question, _Kept]] = (None, {})

    def __len__(self) -> int:
        return len(self._memory[1])

    def decide(self, snapshot: Snapshot, tenant_id: str, request: DecisionRequest, now: float) -> Decision:
        """Same values and same errors as `flexgate.policies.decide.decide`."""
        holder, kept = self._memory
        if holder is not snapshot:
            kept = {}
            self._memory = (snapshot, kept)
        question = (tenant_id, request.purpose, request.region, request.only, request.ignore)
        found = kept.get(question)
        if found is not None and found.since <= now < found.until:
            return Decision(request.decision_id, *found.outcome)
        tenant = find_tenant(snapshot, tenant_id)
        context = declared_context(tenant, request.purpose, request.region)
        granted = grant(snapshot, tenant, context, now)
        decision = narrow(snapshot, tenant, granted, context, request)
        if len(kept) >= self._max_entries:
            kept.clear()
        kept[question] = _Kept(decision[1:], granted.since, granted.until)
        return decision
