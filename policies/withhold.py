"""Snapshots without a right whose revocation could not be stored. Pure; the result never permits more."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from types import MappingProxyType

from flexgate.policies.compiled.agreements import AssigneeAgreements, CompiledAgreement
from flexgate.policies.ids import ExpertId, TenantId
from flexgate.policies.snapshot import Snapshot

Withholding = Callable[[Snapshot], Snapshot]
"""Takes something away; a snapshot that does not have it is returned as it is."""


def without_tenant(snapshot: Snapshot, tenant_id: str) -> Snapshot:
    """As if the tenant were archived."""
    known = snapshot.tenants.get(TenantId(tenant_id))
    if known is None or known.archived:
        return snapshot
    return replace(snapshot, tenants=MappingProxyType({**snapshot.tenants, known.id: replace(known, archived=True)}))


def without_key(snapshot: Snapshot, key_id: str, *, tenant_id: str | None, now: float) -> Snapshot:
    """As if the key, a tenant's or with None another role's, had been revoked at `now` (Unix seconds)."""
    keys = {
        digest: replace(key, revoked=now)
        for digest, key in snapshot.keys.items()
        if key.key_id == key_id and key.tenant_id == tenant_id and key.revoked is None
    }
    return replace(snapshot, keys=MappingProxyType({**snapshot.keys, **keys})) if keys else snapshot


def without_agreement(snapshot: Snapshot, agreement_id: str, *, owner_id: str | None) -> Snapshot:
    """As if the agreement permitted nothing; with an owner only if it is that owner's. What else it says stays."""

    def stays(expert: ExpertId, compiled: CompiledAgreement) -> bool:
        own = owner_id is None or snapshot.experts[expert].owner == owner_id
        return not (compiled.permits and compiled.agreement_id == agreement_id and own)

    reduced = {
        assignee: AssigneeAgreements.of(pair for pair in found.entries() if stays(*pair))
        for assignee, found in snapshot.agreements.items()
        if not all(stays(*pair) for pair in found.entries())
    }
    return replace(snapshot, agreements=MappingProxyType({**snapshot.agreements, **reduced})) if reduced else snapshot


def listing_only(snapshot: Snapshot, tenant_id: str, mode: str, expert_ids: Collection[str]) -> Snapshot:
    """As if the tenant's lists allowed no expert that `mode` and `expert_ids` do not allow too."""
    known = snapshot.tenants.get(TenantId(tenant_id))
    if known is None:
        return snapshot
    listed = frozenset(ExpertId(id_) for id_ in expert_ids if id_ in snapshot.experts)
    for id_, members in snapshot.sets.items():
        listed |= members if id_ in expert_ids else frozenset()
    unlisted = listed if mode == "deny_list" else snapshot.experts.keys() - listed
    named = known.named | unlisted if known.deny_list else known.named - unlisted
    if named == known.named:
        return snapshot
    return replace(snapshot, tenants=MappingProxyType({**snapshot.tenants, known.id: replace(known, named=named)}))
