"""Why a tenant gets what it gets: every listed expert, with the rules for or against it."""

from __future__ import annotations

from dataclasses import dataclass

from flexgate.policies.compiled.agreements import Clause
from flexgate.policies.compiled.compiler import TenantRules
from flexgate.policies.decide import declared_context, find_tenant
from flexgate.policies.decision import DecisionRequest, Reason
from flexgate.policies.entitlements import Context, entitlements
from flexgate.policies.ids import PUBLIC, ExpertId
from flexgate.policies.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Explanation:
    """One expert. Allowed: `permitted_by` names the agreements (for `public` the anchor rule) and
    `until` when it ends (Unix seconds or `math.inf`). Not allowed: `refused` says why.
    """

    expert: ExpertId
    permitted_by: tuple[str, ...]
    until: float | None
    refused: Reason | None


def explain(snapshot: Snapshot, tenant_id: str, request: DecisionRequest, now: float) -> tuple[Explanation, ...]:
    """Explain what the tenant may use before the request filter, in catalogue order.

    Hidden experts do not appear. Raises `UnknownTenant`, `TenantArchived` or `ContextRefused`.
    """
    tenant = find_tenant(snapshot, tenant_id)
    context = declared_context(tenant, request.purpose, request.region)
    entitled = entitlements(snapshot, tenant, context, now)
    hidden = snapshot.hidden_from(tenant)
    return tuple(
        Explanation(
            expert,
            _permitting(snapshot, tenant, context, expert, now) if expert in entitled.lost_at else (),
            entitled.lost_at.get(expert),
            entitled.refused.get(expert),
        )
        for expert in snapshot.experts
        if expert not in hidden
    )


def _permitting(
    snapshot: Snapshot, tenant: TenantRules, context: Context, expert: ExpertId, now: float
) -> tuple[str, ...]:
    if expert == PUBLIC:
        return ("anchor",)
    clauses: list[Clause] = []
    for terms in (snapshot.terms[name] for name in tenant.assignees if name in snapshot.terms):
        clauses += (*terms.unlimited.get(expert, ()), *terms.limited.get(expert, ()))
    in_force = [c for c in clauses if c.permits and c.starts <= now < c.ends]
    return tuple(sorted(c.rule for c in in_force if context.covered_by(c)))
