"""What a tenant may use for one purpose and region at one moment, before a request narrows it.

A grant holds for the half-open time slot `since <= now < until` between two dates of the
agreements that touch it, so a cache may keep it for that long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from flexgate.policies import reasons
from flexgate.policies.decision import Reason
from flexgate.policies.snapshot import Clause, Snapshot, TenantRules
from flexgate.policies.tenants import Expert
from flexgate.policies.terms import PUBLIC, ExpertId
from flexgate.policies.words import Purpose, Region, purpose_and_above, region_and_above


@dataclass(frozen=True, slots=True)
class Context:
    """A declared purpose and region, with the words that cover them."""

    purpose: Purpose | None
    region: Region | None
    purposes: frozenset[str]
    regions: frozenset[str]

    @classmethod
    def of(cls, purpose: Purpose | None, region: Region | None) -> Context:
        return cls(
            purpose,
            region,
            frozenset() if purpose is None else purpose_and_above(purpose),
            frozenset() if region is None else region_and_above(region),
        )

    def permitted_purpose(self, clause: Clause) -> bool:
        """Whether the clause covers all of the declared purpose."""
        return clause.purposes is None or not clause.purposes.isdisjoint(self.purposes)

    def permitted_region(self, clause: Clause) -> bool:
        """Whether the clause covers all of the declared region."""
        return clause.regions is None or not clause.regions.isdisjoint(self.regions)

    def touched_by(self, clause: Clause) -> bool:
        """Whether the clause covers any part of the declared purpose and region."""
        return (
            self.purpose is None
            or self.permitted_purpose(clause)
            or self.purpose in clause.purposes_above
        ) and (
            self.region is None
            or self.permitted_region(clause)
            or self.region in clause.regions_above
        )


@dataclass(frozen=True, slots=True)
class Grant:
    """`lost_at` says for each allowed expert when it stops being allowed (`math.inf`: never).

    `refused` has one reason for each listed expert that is not allowed. Both are in catalogue
    order; an expert hidden from the tenant is in neither.
    """

    lost_at: Mapping[ExpertId, float]
    refused: Mapping[ExpertId, Reason]
    since: float
    until: float


def grant(snapshot: Snapshot, tenant: TenantRules, context: Context, now: float) -> Grant:
    """Apply agreements, the tenant's mode, visibility and liveness. Pure; default deny."""
    lost_at: dict[ExpertId, float] = {}
    refused: dict[ExpertId, Reason] = {}
    since, until = -math.inf, math.inf
    tables = [table for name in tenant.assignees if (table := snapshot.clauses.get(name))]
    for id_, expert in snapshot.experts.items():
        if id_ in tenant.hidden:
            continue
        clauses = [clause for table in tables for clause in table.get(id_, ())]
        for clause in clauses:
            for moment in (clause.starts, clause.ends):
                if moment <= now:
                    since = max(since, moment)
                else:
                    until = min(until, moment)
        reason = _refusal(tenant, expert, clauses, context, now)
        if reason is None:
            lost_at[id_] = _lost_at(id_, clauses, context, now)
        else:
            refused[id_] = reason
    return Grant(MappingProxyType(lost_at), MappingProxyType(refused), since, until)


def _refusal(
    tenant: TenantRules, expert: Expert, clauses: list[Clause], context: Context, now: float
) -> Reason | None:
    """Why the tenant may not use the expert, by the first rule that says so."""
    if expert.id != PUBLIC:
        reason = _terms_refusal(expert, clauses, context, now)
        if reason is not None:
            return reason
        if tenant.deny_list and expert.id in tenant.named:
            return reasons.on_deny_list(expert.id)
        if not tenant.deny_list and expert.id not in tenant.named:
            return reasons.not_on_allow_list(expert.id)
    return None if expert.live else reasons.not_live(expert.id)


def _terms_refusal(
    expert: Expert, clauses: list[Clause], context: Context, now: float
) -> Reason | None:
    in_force = [clause for clause in clauses if clause.starts <= now < clause.ends]
    prohibitions = [c for c in in_force if not c.permits and context.touched_by(c)]
    if prohibitions:
        return reasons.prohibited(expert, min(prohibitions, key=_by_id))
    if any(_permits(clause, context) for clause in in_force):
        return None
    return _nearest_miss(expert, [c for c in clauses if c.permits], context, now)


def _nearest_miss(expert: Expert, permits: list[Clause], context: Context, now: float) -> Reason:
    """The permission that comes closest, so that the reason says what is really missing."""
    in_force = [c for c in permits if c.starts <= now < c.ends]
    right_place = [c for c in in_force if context.permitted_region(c)]
    if right_place:
        return reasons.purpose_not_permitted(expert, min(right_place, key=_by_id), context.purpose)
    if in_force:
        return reasons.region_not_permitted(expert, min(in_force, key=_by_id), context.region)
    coming = [c for c in permits if now < c.starts and _permits(c, context)]
    if coming:
        return reasons.not_started(expert, min(coming, key=lambda c: (c.starts, c.agreement_id)))
    past = [c for c in permits if c.ends <= now and _permits(c, context)]
    if past:
        return reasons.ended(expert, min(past, key=lambda c: (-c.ends, c.agreement_id)))
    return reasons.no_agreement(expert)


def _lost_at(expert: ExpertId, clauses: list[Clause], context: Context, now: float) -> float:
    """The first moment after `now` at which no permission is left, or a prohibition starts."""
    if expert == PUBLIC:
        return math.inf
    permitted_until = now
    permits = sorted((c for c in clauses if _permits(c, context)), key=lambda c: c.starts)
    for clause in permits:
        if clause.starts <= permitted_until:
            permitted_until = max(permitted_until, clause.ends)
    coming = (c.starts for c in clauses if not c.permits and context.touched_by(c))
    return min([permitted_until, *(start for start in coming if start > now)])


def _permits(clause: Clause, context: Context) -> bool:
    return clause.permits and context.permitted_purpose(clause) and context.permitted_region(clause)


def _by_id(clause: Clause) -> str:
    return clause.agreement_id
