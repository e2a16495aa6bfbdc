"""Cache of decisions, each kept for as long as it holds.

The pure function stays the authority: what is kept was computed by it, from the same snapshot
object and inside the same time slot, so a kept answer cannot differ from a computed one. In which order,
and how often, a request names experts changes no decision, so it makes no other question. Refusals are not kept.

A tenant has places of its own, and what it asks too much pushes out what it asked before. One cache per
process; calls from several threads are safe, and at worst compute twice.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from flexgate.policies.compiled.agreements import CompiledAgreement
from flexgate.policies.decide import apply_filter, declared_context, find_tenant
from flexgate.policies.decision import AllowedExperts, Decision, DecisionRequest, Reason
from flexgate.policies.entitlements import entitlements
from flexgate.policies.ids import ExpertId, TenantId
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.vocabulary import Purpose, Region

_Names = frozenset[str] | tuple[str, ...]
_Question = tuple[str | None, str | None, _Names | None, _Names]
_Agreements = tuple[CompiledAgreement | None, ...]
_Outcome = tuple[
    TenantId,
    int,
    AllowedExperts,
    _Agreements,
    tuple[Reason, ...],
    frozenset[ExpertId],
    float,
    Purpose | None,
    Region | None,
]
MAX_ENTRIES: Final = 65_536
MAX_OF_ONE: Final = 256
"""Decisions of one tenant."""


@dataclass(frozen=True, slots=True)
class _Kept:
    outcome: _Outcome
    since: float
    until: float


@dataclass(slots=True)
class _Memory:
    """Cached decisions of one snapshot, by tenant; `size` is their number."""

    snapshot: Snapshot | None
    tenants: OrderedDict[str, dict[_Question, _Kept]] = field(default_factory=OrderedDict)
    size: int = 0


class DecisionCache:
    """`decide` with a memory. A new snapshot starts an empty one.

    Once it is full, what a tenant asks anew takes the place of its own oldest decision; only a tenant that has none
    takes the places of another, the one that came first.
    """

    def __init__(self, max_entries: int = MAX_ENTRIES, max_of_one: int = MAX_OF_ONE) -> None:
        self._max_entries = max_entries
        self._max_of_one = max_of_one
        self._memory = _Memory(None)
        self._keeping = threading.Lock()

    def __len__(self) -> int:
        return self._memory.size

    def decide(self, snapshot: Snapshot, tenant_id: str, request: DecisionRequest, now: float) -> Decision:
        """Same values and same errors as `flexgate.policies.decide.decide`."""
        memory = self._memory
        if memory.snapshot is not snapshot:
            memory = self._memory = _Memory(snapshot)
        only, ignore = request.only, request.ignore
        question = (request.purpose, request.region, only and frozenset(only), ignore and frozenset(ignore))
        own = memory.tenants.get(tenant_id)
        found = None if own is None else own.get(question)
        if found is not None and found.since <= now < found.until:
            return Decision(request.decision_id, *found.outcome)
        tenant = find_tenant(snapshot, tenant_id)
        context = declared_context(tenant, request.purpose, request.region)
        entitled = entitlements(snapshot, tenant, context, now)
        decision = apply_filter(snapshot, tenant, entitled, context, request)
        with self._keeping:
            self._keep(memory, tenant_id, question, _Kept(decision[1:], entitled.since, entitled.until))
        return decision

    def _keep(self, memory: _Memory, tenant_id: str, question: _Question, kept: _Kept) -> None:
        own = memory.tenants.setdefault(tenant_id, {})
        if question not in own:
            full = memory.size >= self._max_entries
            if own and (full or len(own) >= self._max_of_one):
                del own[next(iter(own))]
                memory.size -= 1
            elif full:
                _, others = memory.tenants.popitem(last=False)
                memory.size -= len(others)
            memory.size += 1
        own[question] = kept
