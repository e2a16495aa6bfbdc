"""Explain what a tenant may use: every listed expert, with the rules for or against it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from flexgate.policies.compiled.agreements import AssigneeAgreements, CompiledAgreement
from flexgate.policies.compiled.compiler import TenantRules
from flexgate.policies.context import Context
from flexgate.policies.decide import apply_filter, declared_context, find_tenant
from flexgate.policies.decision import DecisionRequest, Reason
from flexgate.policies.documents import Grade
from flexgate.policies.entitlements import Entitlements, entitlements
from flexgate.policies.errors import DecisionRefused
from flexgate.policies.ids import PUBLIC, ExpertId, TenantId
from flexgate.policies.snapshot import Snapshot

ALWAYS: Final = "expert/required"
"""What requires an expert of every request: the catalogue."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """One expert. Allowed: `permitted_by` names the agreements (for `public` `anchor`, without an owner `unowned`),
    `counts_under` the one of them that its use counts under, and `until` when it ends (Unix seconds or `math.inf`). Not
    allowed: `refused` says why. `required_by` names what requires it, allowed or not. `grade` is the expert's.
    """

    expert: ExpertId
    permitted_by: tuple[str, ...]
    counts_under: str | None
    until: float | None
    refused: Reason | None
    required_by: tuple[str, ...]
    grade: Grade


class Explained(NamedTuple):
    """`refused` says why a request without a filter is refused, though each expert has an explanation of its own."""

    experts: tuple[Explanation, ...]
    refused: DecisionRefused | None


def explain(snapshot: Snapshot, tenant_id: str, request: DecisionRequest, now: float) -> Explained:
    """Explain what the tenant may use before the request filter, in catalogue order.

    Hidden experts do not appear. Raises `UnknownTenant`, `TenantArchived` or `ContextRefused`.
    """
    tenant = find_tenant(snapshot, tenant_id)
    context = declared_context(tenant, request.purpose, request.region)
    entitled = entitlements(snapshot, tenant, context, now)
    experts = tuple(
        Explanation(
            expert,
            _permitting(snapshot, tenant, context, expert, now) if expert in entitled.lost_at else (),
            _counted(entitled, expert),
            entitled.lost_at.get(expert),
            entitled.refused.get(expert),
            _requiring(snapshot, tenant, context, expert, now),
            document.grade,
        )
        for expert, document in snapshot.experts.items()
        if expert not in entitled.hidden
    )
    try:
        apply_filter(snapshot, tenant, entitled, context, replace(request, only=None, ignore=()))
    except DecisionRefused as error:
        return Explained(experts, error)
    return Explained(experts, None)


def needing(snapshot: Snapshot, expert: str, now: float) -> tuple[TenantId, ...]:
    """The active tenants of whom an expert is required now, in all of their requests or in those of some purposes."""
    active = (tenant for tenant in snapshot.tenants.values() if not tenant.archived)
    if expert in snapshot.required:
        return tuple(tenant.id for tenant in active)
    assignees = {
        assignee
        for assignee, of_one in snapshot.agreements.items()
        if any(one.starts <= now < one.ends for one in of_one.required.get(ExpertId(expert), ()))
    }
    return tuple(tenant.id for tenant in active if not assignees.isdisjoint(tenant.assignees))


def _counted(entitled: Entitlements, expert: ExpertId) -> str | None:
    agreement = entitled.agreements.get(expert)
    return agreement.rule if agreement is not None and expert in entitled.lost_at else None


def _permitting(
    snapshot: Snapshot, tenant: TenantRules, context: Context, expert: ExpertId, now: float
) -> tuple[str, ...]:
    if expert == PUBLIC:
        return ("anchor",)
    if snapshot.experts[expert].owner is None:
        return ("unowned",)
    agreements: list[CompiledAgreement] = []
    for of_one in _agreements(snapshot, tenant):
        agreements += (*of_one.unlimited.get(expert, ()), *of_one.limited.get(expert, ()))
    in_force = [one for one in agreements if one.permits and one.starts <= now < one.ends]
    return tuple(sorted(one.rule for one in in_force if context.covered_by(one)))


def _requiring(
    snapshot: Snapshot, tenant: TenantRules, context: Context, expert: ExpertId, now: float
) -> tuple[str, ...]:
    always = (ALWAYS,) if expert in snapshot.required - tenant.may_ignore else ()
    agreements = [one for of_one in _agreements(snapshot, tenant) for one in of_one.required.get(expert, ())]
    in_force = [one for one in agreements if one.starts <= now < one.ends and context.touched_by(one)]
    return (*always, *sorted(one.rule for one in in_force))


def _agreements(snapshot: Snapshot, tenant: TenantRules) -> list[AssigneeAgreements]:
    return [snapshot.agreements[name] for name in tenant.assignees if name in snapshot.agreements]
