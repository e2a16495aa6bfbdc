"""What a tenant may use for one purpose and region at one moment, before a request narrows it.

A grant holds for the half-open time slot `since <= now < until` between two dates of the
agreements that touch it, so a cache may keep it for that long.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from flexgate.policies import reasons
from flexgate.policies.clauses import Clause, ClauseTable, by_start
from flexgate.policies.decision import Reason
from flexgate.policies.errors import ClockInvalid
from flexgate.policies.snapshot import Snapshot, TenantRules
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


_ANCHOR: Final = frozenset({PUBLIC})
_NOBODY: Final[frozenset[ExpertId]] = frozenset()
ANYTHING: Final = Context.of(None, None)


class Grant(NamedTuple):
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
    limited, unlimited = _rows(snapshot.limited, tenant), _rows(snapshot.unlimited, tenant)
    alone = limited[0] if len(limited) == 1 else None
    always, sometimes = _ANCHOR.union(*unlimited), _NOBODY.union(*limited)
    hidden, deny_list = tenant.hidden, tenant.deny_list
    named = tenant.named if deny_list else tenant.named | _ANCHOR
    lost_at: dict[ExpertId, float] = {}
    refused: dict[ExpertId, Reason] = {}
    for id_, live, standard in snapshot.catalogue:
        if hidden and id_ in hidden:
            continue
        until, reason = math.inf, None
        if id_ in sometimes:
            clauses = alone[id_] if alone else _clauses(limited, id_)
            first = clauses[0]
            if len(clauses) == 1 and first.whatever and first.starts <= now < first.ends and id_ not in always:
                until = first.ends
            else:
                until, reason = _terms(snapshot.experts[id_], id_ in always, clauses, context, now)
        elif id_ not in always:
            reason = standard.no_agreement
        if reason is not None:
            refused[id_] = reason
        elif (id_ in named) == deny_list:
            refused[id_] = standard.on_deny_list if deny_list else standard.not_on_allow_list
        elif not live:
            refused[id_] = standard.not_live
        else:
            lost_at[id_] = until
    since, until = _time_slot(snapshot, tenant, now)
    return Grant(lost_at, refused, since, until)


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
