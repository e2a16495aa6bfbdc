"""Decide which experts one request may use. Pure: no clock, no database, no environment.

    gate = (some agreement in force permits expert → tenant, and none prohibits)
           ∩ the tenant's mode ∩ the request filter ∩ live experts

A request filter only takes away, and never what is required; where that cannot take part, the request is refused.
A hidden expert is treated like a name that does not exist: both raise the same `UnknownExpert`. Repeated work can be
spared with `flexgate.policies.cache.DecisionCache`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from flexgate.policies import reasons
from flexgate.policies.compiled.compiler import TenantRules
from flexgate.policies.context import ANYTHING, Context
from flexgate.policies.decision import Decision, DecisionRequest, Reason, allow
from flexgate.policies.documents import Grade, is_below
from flexgate.policies.entitlements import Entitlements, entitlements
from flexgate.policies.errors import (
    ContextRefused,
    EmptyGate,
    ExpertDenied,
    ExpertRequired,
    GradeTooLow,
    InvalidName,
    LayerWithoutExpert,
    RequiredExpertMissing,
    TenantArchived,
    UnknownExpert,
    UnknownTenant,
)
from flexgate.policies.ids import PUBLIC, ExpertId, SetId, TenantId
from flexgate.policies.requirements import Required
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.vocabulary import Purpose, Region, parse_purpose, parse_region

ONLY: Final = "flexgate.experts.only"
IGNORE: Final = "flexgate.experts.ignore"
_NOTHING: Final[frozenset[ExpertId]] = frozenset()
_NO_REASONS: Final[Mapping[ExpertId, Reason]] = MappingProxyType({})


def decide(snapshot: Snapshot, tenant_id: str, request: DecisionRequest, now: float) -> Decision:
    """The decision for one request at `now` (Unix seconds); raises a `DecisionRefused`."""
    tenant = find_tenant(snapshot, tenant_id)
    context = declared_context(tenant, request.purpose, request.region)
    return apply_filter(snapshot, tenant, entitlements(snapshot, tenant, context, now), context, request)


def find_tenant(snapshot: Snapshot, tenant_id: str) -> TenantRules:
    """The tenant's rules; raises `UnknownTenant` or `TenantArchived`."""
    tenant = snapshot.tenants.get(TenantId(tenant_id))
    if tenant is None:
        raise UnknownTenant(f"There is no project '{tenant_id}'. Check the id.")
    if tenant.archived:
        raise TenantArchived(f"Project '{tenant_id}' is archived. Use a key of another project.")
    return tenant


def declared_context(tenant: TenantRules, purpose: str | None, region: str | None) -> Context:
    """The purpose and region, checked against what the tenant may declare."""
    if purpose is None and region is None:
        return ANYTHING
    return Context.of(_purpose(tenant, purpose), _region(tenant, region))


def _purpose(tenant: TenantRules, text: str | None) -> Purpose | None:
    if text is None:
        return None
    param = "flexgate.purpose"
    try:
        purpose = parse_purpose(text)
    except InvalidName as error:
        raise ContextRefused(f"{error}.", param=param) from None
    if purpose not in tenant.purposes:
        raise ContextRefused(_not_registered("purpose", purpose, tenant.purposes), param=param)
    return purpose


def _region(tenant: TenantRules, text: str | None) -> Region | None:
    if text is None:
        return None
    param = "flexgate.region"
    try:
        region = parse_region(text)
    except InvalidName as error:
        raise ContextRefused(f"{error}.", param=param) from None
    if region not in tenant.regions:
        raise ContextRefused(_not_registered("region", region, tenant.regions), param=param)
    return region


def _not_registered(kind: str, word: str, registered: frozenset[str]) -> str:
    if not registered:
        return (
            f"No {kind} is registered for this project, so that no request may declare '{word}'. "
            "Declare none, or ask an administrator to register it."
        )
    return (
        f"The {kind} '{word}' is not registered for this project (registered: {', '.join(sorted(registered))}). "
        "Declare a registered one, or ask an administrator to register it."
    )


def apply_filter(
    snapshot: Snapshot,
    tenant: TenantRules,
    entitled: Entitlements,
    context: Context,
    request: DecisionRequest,
) -> Decision:
    """Apply the request filter to the entitlements; raises a `DecisionRefused`."""
    only = None if request.only is None else _named(snapshot, entitled, request.only, ONLY)
    ignore = _named(snapshot, entitled, request.ignore, IGNORE) if request.ignore else _NOTHING
    _check_required(snapshot, tenant, entitled, ignore)
    required = entitled.required.experts - ignore
    if only:
        _check_allowed(entitled, only)
    kept, left_out = entitled.lost_at, _NO_REASONS
    wanted = tenant.default_experts if only is None else only
    if wanted is not None or ignore:
        left_out = _left_out(snapshot, entitled, only, tenant.default_experts, ignore)
        kept = {
            expert: _kept_until(snapshot, entitled, wanted, expert, lost)
            for expert, lost in kept.items()
            if expert not in left_out
        }
    if not kept:
        raise EmptyGate(
            "'flexgate.experts' leaves no expert for this request. Keep at least one that the project may use.",
            param="flexgate.experts",
        )
    _check_layers(snapshot.empty_layers, kept)
    if tenant.min_grade is not None:
        _check_grades(snapshot, entitled.hidden, tenant.min_grade, kept)
    return Decision(
        decision_id=request.decision_id,
        tenant_id=tenant.id,
        policy_version=snapshot.policy_version,
        allowed=allow(kept),
        agreements=tuple(map(entitled.agreements.get, kept)),
        excluded=_excluded(snapshot, entitled, left_out),
        required=required,
        valid_until=_valid_until(kept, entitled.required),
        purpose=context.purpose,
        region=context.region,
    )


def _kept_until(
    snapshot: Snapshot, entitled: Entitlements, wanted: frozenset[ExpertId] | None, expert: ExpertId, lost: float
) -> float:
    """When an expert of the gate leaves it: one that is not wanted stays no longer than agreements require it."""
    if wanted is None or expert in wanted or expert in snapshot.required:
        return lost
    requirement = entitled.required.by_agreement.get(expert)
    return lost if requirement is None else min(lost, requirement.until)


def _valid_until(kept: Mapping[ExpertId, float], required: Required) -> float:
    """When the first expert of the gate stops being allowed, or one outside it begins to be required."""
    coming = [at for expert, at in required.coming.items() if expert not in kept]
    return min(min(kept.values()), min(coming, default=math.inf))


def _named(snapshot: Snapshot, entitled: Entitlements, names: tuple[str, ...], param: str) -> frozenset[ExpertId]:
    """The listed experts that `names` stands for; a set stands for its listed members."""
    found: set[ExpertId] = set()
    for position, name in enumerate(names):
        members = snapshot.sets.get(SetId(name), (ExpertId(name),))
        listed = {m for m in members if m in entitled.lost_at or m in entitled.refused}
        if not listed:
            raise UnknownExpert(
                f"'{param}[{position}]' does not name an expert or set that is visible to this project. "
                "GET /v1/experts lists its experts.",
                param=f"{param}[{position}]",
            )
        found |= listed
    return frozenset(found)


def _check_required(
    snapshot: Snapshot, tenant: TenantRules, entitled: Entitlements, ignore: frozenset[ExpertId]
) -> None:
    """What is required takes part, or nothing is answered."""
    required = entitled.required.experts
    for expert in required if len(required) == 1 else (id_ for id_ in snapshot.experts if id_ in required):
        if expert in ignore:
            if expert not in tenant.may_ignore:
                raise ExpertRequired(
                    f"'{IGNORE}' names '{expert}', which {_requirement(entitled, expert)}. {_instead(expert)}",
                    param=IGNORE,
                )
        elif expert not in entitled.lost_at:
            raise RequiredExpertMissing(
                f"Expert '{expert}', which {_requirement(entitled, expert)}, is not available to this request. "
                f"{entitled.refused[expert].message}"
            )


def _requirement(entitled: Entitlements, expert: ExpertId) -> str:
    """What requires an expert; the end of "which …"."""
    found = entitled.required.by_agreement.get(expert)
    if found is None:
        return "every request to this server uses"
    return f"{reasons.named(found.agreement)} requires"


def _instead(expert: ExpertId) -> str:
    if expert == PUBLIC:
        return "Remove it from there, or ask an administrator to set 'anchor_optional'."
    return "Remove it from there."


def _check_layers(empty: Mapping[ExpertId, frozenset[int]], kept: Mapping[ExpertId, float]) -> None:
    """In each layer some expert of the gate takes part, or nothing is answered."""
    if not empty or any(expert not in empty for expert in kept):
        return
    if frozenset.intersection(*(empty[expert] for expert in kept)):
        raise LayerWithoutExpert(reasons.LAYER_WITHOUT_EXPERT)


def _check_grades(
    snapshot: Snapshot, hidden: frozenset[ExpertId], least: Grade, kept: Mapping[ExpertId, float]
) -> None:
    """What is excluded is excluded as completely as the tenant demands, or nothing is answered.

    Hidden experts count too, and are not named.
    """
    poor = [id_ for id_, expert in snapshot.experts.items() if id_ not in kept and is_below(expert.grade, least)]
    if not poor:
        return
    listed = [f"'{id_}' (grade '{snapshot.experts[id_].grade}')" for id_ in poor if id_ not in hidden]
    raise GradeTooLow(reasons.grade_too_low(listed, least))


def _check_allowed(entitled: Entitlements, only: frozenset[ExpertId]) -> None:
    denied = [reason for expert, reason in entitled.refused.items() if expert in only]
    if denied:
        raise ExpertDenied(" ".join(reason.message for reason in denied), reasons=denied, param=ONLY)


def _left_out(
    snapshot: Snapshot,
    entitled: Entitlements,
    only: frozenset[ExpertId] | None,
    default_experts: frozenset[ExpertId] | None,
    ignore: frozenset[ExpertId],
) -> Mapping[ExpertId, Reason]:
    """The allowed experts that the request leaves out, each with its reason."""
    wanted, because = (default_experts, reasons.outside_default_set) if only is None else (only, reasons.outside_only)
    required = entitled.required.experts
    left_out: dict[ExpertId, Reason] = {}
    for expert in entitled.lost_at:
        if expert in ignore:
            left_out[expert] = reasons.ignored(expert, snapshot.experts[expert].grade)
        elif wanted is not None and expert not in wanted and expert not in required:
            left_out[expert] = because(expert, snapshot.experts[expert].grade)
    return left_out


def _excluded(snapshot: Snapshot, entitled: Entitlements, left_out: Mapping[ExpertId, Reason]) -> tuple[Reason, ...]:
    if not left_out:
        return tuple(entitled.refused.values())
    both = {**entitled.refused, **left_out}
    return tuple(both[expert] for expert in snapshot.experts if expert in both)
