"""What a tenant may use for one purpose and region at one moment, before a request narrows it.

A grant holds for the half-open time slot `since <= now < until` between two dates of the
agreements that touch it, so a cache may keep it for that long.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from flexgate.policies import reasons
from flexgate.policies.decision import Reason
from flexgate.policies.errors import ClockInvalid
from flexgate.policies.snapshot import Clause, ClauseTable, Snapshot, TenantRules, by_start
from flexgate.policies.tenants import Expert
from flexgate.policies.terms import PUBLIC, ExpertId
from flexgate.policies.words import Purpose, Region, purpose_and_above, region_and_above

_Row = Mapping[ExpertId, tuple[Clause, ...]]


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

    def covered_by(self, clause: Clause) -> bool:
        """Whether the clause is about all of the declared purpose and region."""
        return (clause.purposes is None or not clause.purposes.isdisjoint(self.purposes)) and (
            clause.regions is None or not clause.regions.isdisjoint(self.regions)
        )

    def touched_by(self, clause: Clause) -> bool:
        """Whether the clause is about any part of the declared purpose and region."""
        return (
            clause.purposes is None
            or self.purpose is None
            or not clause.purposes.isdisjoint(self.purposes)
            or self.purpose in clause.purposes_above
        ) and (
            clause.regions is None
            or self.region is None
            or not clause.regions.isdisjoint(self.regions)
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
    if math.isnan(now):
        raise ClockInvalid("the time given is not a number")
    limited = _rows(snapshot.limited, tenant)
    always: set[ExpertId] = set().union(*_rows(snapshot.unlimited, tenant))
    sometimes: set[ExpertId] = set().union(*limited)
    lost_at: dict[ExpertId, float] = {}
    refused: dict[ExpertId, Reason] = {}
    for id_, expert in snapshot.experts.items():
        if id_ in tenant.hidden:
            continue
        until, reason = math.inf, None
        if id_ in sometimes:
            until, reason = _terms(expert, id_ in always, _clauses(limited, id_), context, now)
        elif id_ not in always and id_ != PUBLIC:
            reason = reasons.no_agreement(id_, expert.owner)
        reason = reason or _admission_refusal(tenant, expert)
        if reason is None:
            lost_at[id_] = until
        else:
            refused[id_] = reason
    since, until = _time_slot(snapshot, tenant, now)
    return Grant(MappingProxyType(lost_at), MappingProxyType(refused), since, until)


def _rows(table: ClauseTable, tenant: TenantRules) -> list[_Row]:
    return [row for name in tenant.assignees if (row := table.get(name))]


def _clauses(rows: list[_Row], expert: ExpertId) -> tuple[Clause, ...]:
    """The limited agreements about one expert, by start."""
    found = [clauses for row in rows if (clauses := row.get(expert))]
    if len(found) == 1:
        return found[0]
    return tuple(sorted((clause for clauses in found for clause in clauses), key=by_start))


def _time_slot(snapshot: Snapshot, tenant: TenantRules, now: float) -> tuple[float, float]:
    """The last date up to `now` and the first date after it, of agreements with the tenant."""
    since, until = -math.inf, math.inf
    for name in tenant.assignees:
        dates = snapshot.dates.get(name, ())
        place = bisect_right(dates, now)
        if place > 0:
            since = max(since, dates[place - 1])
        if place < len(dates):
            until = min(until, dates[place])
    return since, until


def _admission_refusal(tenant: TenantRules, expert: Expert) -> Reason | None:
    """What the tenant's mode or the engine has against an expert that the terms permit."""
    if expert.id != PUBLIC and (expert.id in tenant.named) == tenant.deny_list:
        if tenant.deny_list:
            return reasons.on_deny_list(expert.id)
        return reasons.not_on_allow_list(expert.id)
    return None if expert.live else reasons.not_live(expert.id)


def _terms(
    expert: Expert, always: bool, clauses: tuple[Clause, ...], context: Context, now: float
) -> tuple[float, Reason | None]:
    """Until when the agreements permit the expert, or why they do not.

    `always` says that an unlimited agreement permits it; `clauses` are the limited ones, by start,
    so that one pass finds how far permissions reach without a gap.
    """
    permitted_until = math.inf if always else now
    banned_from = math.inf
    bans = []
    for clause in clauses:
        if clause.permits:
            if clause.starts <= permitted_until < clause.ends and context.covered_by(clause):
                permitted_until = clause.ends
        elif now < clause.ends and context.touched_by(clause):
            if clause.starts <= now:
                bans.append(clause)
            banned_from = min(banned_from, clause.starts)
    if bans:
        return now, reasons.prohibited(expert, min(bans, key=_by_id))
    if permitted_until > now:
        return min(permitted_until, banned_from), None
    return now, _nearest_miss(expert, [c for c in clauses if c.permits], context, now)


def _nearest_miss(expert: Expert, permits: list[Clause], context: Context, now: float) -> Reason:
    """The permission that comes closest, so that the reason says what is really missing."""
    in_force = [c for c in permits if c.starts <= now < c.ends]
    if in_force:
        return _out_of_scope(expert, in_force, context)
    covering = [c for c in permits if context.covered_by(c)]
    coming = [c for c in covering if now < c.starts]
    if coming:
        return reasons.not_started(expert, min(coming, key=lambda c: (c.starts, c.agreement_id)))
    if covering:
        return reasons.ended(expert, min(covering, key=lambda c: (-c.ends, c.agreement_id)))
    return reasons.no_agreement(expert.id, expert.owner)


def _out_of_scope(expert: Expert, in_force: list[Clause], context: Context) -> Reason:
    right_place = [c for c in in_force if c.regions is None or not c.regions.isdisjoint(context.regions)]
    if right_place:
        return reasons.purpose_not_permitted(expert, min(right_place, key=_by_id), context.purpose)
    return reasons.region_not_permitted(expert, min(in_force, key=_by_id), context.region)


def _by_id(clause: Clause) -> str:
    return clause.agreement_id
