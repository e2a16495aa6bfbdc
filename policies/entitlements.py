"""Entitlements: what a tenant may use for one purpose and region at one moment, before the request filter.

Entitlements hold for the half-open time slot `since <= now < until` between two dates of the
agreements that touch them, so a cache may keep them for that long.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flexgate.policies import reasons
from flexgate.policies.compiled.agreements import (
    ANCHOR,
    AssigneeAgreements,
    ByStart,
    CompiledAgreement,
    Row,
    by_start,
    precedence_of,
)
from flexgate.policies.compiled.compiler import TenantRules
from flexgate.policies.context import Context
from flexgate.policies.decision import Reason
from flexgate.policies.documents import Expert
from flexgate.policies.errors import ClockInvalid
from flexgate.policies.ids import ExpertId
from flexgate.policies.requirements import Required, required_of
from flexgate.policies.snapshot import Snapshot


class Entitlements(NamedTuple):
    """`lost_at` says for each allowed expert when it stops being allowed (`math.inf`: never).

    `refused` has one reason for each listed expert that is not allowed. Both are in catalogue
    order; an expert hidden from the tenant is in neither. `agreements` has, in any order, the agreement that each
    allowed expert's use counts under, where it needs one, and what others would count under. `required` is what must
    take part, allowed or not; `hidden` are those that do not exist for the tenant.
    """

    lost_at: Mapping[ExpertId, float]
    agreements: Mapping[ExpertId, CompiledAgreement]
    refused: Mapping[ExpertId, Reason]
    required: Required
    hidden: frozenset[ExpertId]
    since: float
    until: float


def entitlements(snapshot: Snapshot, tenant: TenantRules, context: Context, now: float) -> Entitlements:
    """Apply agreements, the tenant's mode, visibility and liveness. Pure; default deny."""
    if math.isnan(now):
        raise ClockInvalid("the time given is not a number")
    found = [of_one for name in tenant.assignees if (of_one := snapshot.agreements.get(name))]
    one = found[0] if len(found) == 1 else None
    always, preferred, limited = _together(found) if one is None else (one.always, one.preferred, one.limited)
    (hidden, shown), deny_list = snapshot.concealed(tenant, now), tenant.deny_list
    required = required_of(snapshot.required, found, context, now)
    named = tenant.named - required.experts if deny_list else tenant.named | required.experts
    forever = math.inf
    lost_at: dict[ExpertId, float] = {}
    counted: dict[ExpertId, CompiledAgreement] = {}
    refused: dict[ExpertId, Reason] = {}
    for id_, live, standard in snapshot.catalogue:
        if hidden and id_ in hidden:
            continue
        until, reason = forever, None
        if id_ in limited:
            agreements = limited[id_]
            first = agreements[0]
            if len(agreements) == 1 and first.whatever and first.starts <= now < first.ends and id_ not in always:
                until, counted[id_] = first.ends, first  # as `_judge` would find, in the most frequent case
            else:
                until, reason, agreement = _judge(snapshot.experts[id_], preferred.get(id_), agreements, context, now)
                if agreement is not None:
                    counted[id_] = agreement
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
    for id_, requirement in required.by_agreement.items():
        if id_ in lost_at and id_ not in snapshot.required and (id_ in tenant.named) == deny_list:
            lost_at[id_] = min(lost_at[id_], requirement.until)
    for id_, hidden_again in shown.items():
        if id_ in lost_at and id_ not in snapshot.required:
            lost_at[id_] = min(lost_at[id_], hidden_again)
    since, until = _time_slot(found, now)
    counts_under = {**preferred, **counted} if counted else preferred
    return Entitlements(lost_at, counts_under, refused, required, hidden, since, until)


def _together(
    found: list[AssigneeAgreements],
) -> tuple[frozenset[ExpertId], Mapping[ExpertId, CompiledAgreement], Row]:
    """What several assignees are always permitted, under which agreements, and their limited agreements, by start."""
    preferred: dict[ExpertId, CompiledAgreement] = {}
    limited: dict[ExpertId, ByStart] = {}
    for of_one in found:
        for expert, agreement in of_one.preferred.items():
            preferred[expert] = min(preferred.get(expert, agreement), agreement, key=precedence_of)
        for expert, agreements in of_one.limited.items():
            known = limited.get(expert)
            limited[expert] = agreements if known is None else tuple(sorted((*known, *agreements), key=by_start))
    return ANCHOR.union(preferred), preferred, limited


def _time_slot(found: list[AssigneeAgreements], now: float) -> tuple[float, float]:
    """The last date up to `now` and the first date after it, of agreements with the tenant."""
    since, until = -math.inf, math.inf
    for of_one in found:
        place = bisect_right(of_one.dates, now)
        if place > 0:
            since = max(since, of_one.dates[place - 1])
        if place < len(of_one.dates):
            until = min(until, of_one.dates[place])
    return since, until


def _judge(
    expert: Expert, unlimited: CompiledAgreement | None, limited: ByStart, context: Context, now: float
) -> tuple[float, Reason | None, CompiledAgreement | None]:
    """Until when the agreements permit the expert, or why they do not, and which its use counts under."""
    permissions = [one for one in limited if one.permits and now < one.ends and context.covered_by(one)]
    prohibitions = [one for one in limited if not one.permits and now < one.ends and context.touched_by(one)]
    prohibiting = [one for one in prohibitions if one.starts <= now]
    if prohibiting:
        return now, reasons.prohibited(expert, min(prohibiting, key=_by_id)), None
    permitting = [one for one in permissions if one.starts <= now]
    if unlimited is not None:
        permitting.append(unlimited)
    if not permitting:
        return now, _nearest_miss(expert, [one for one in limited if one.permits], context, now), None
    until = math.inf if unlimited is not None else _gap_after(permissions, now)
    if prohibitions:  # by start, as all of them
        until = min(until, prohibitions[0].starts)
    return until, None, min(permitting, key=precedence_of)


def _gap_after(permissions: Sequence[CompiledAgreement], now: float) -> float:
    """The first moment from `now` on at which none of the permissions, which are by start, is in force."""
    until = now
    for one in permissions:
        if one.starts <= until < one.ends:
            until = one.ends
    return until


def _nearest_miss(expert: Expert, permits: list[CompiledAgreement], context: Context, now: float) -> Reason:
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
    return reasons.no_agreement(expert.id, expert.owner, expert.grade)


def _out_of_scope(expert: Expert, in_force: list[CompiledAgreement], context: Context) -> Reason:
    right_place = [c for c in in_force if c.regions is None or not c.regions.isdisjoint(context.regions)]
    if right_place:
        return reasons.purpose_not_permitted(expert, min(right_place, key=_by_id), context.purpose)
    return reasons.region_not_permitted(expert, min(in_force, key=_by_id), context.region)


def _by_id(agreement: CompiledAgreement) -> str:
    return agreement.agreement_id
