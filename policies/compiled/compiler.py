"""Compile documents against a catalogue: expand sets, refuse unknown names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from flexgate.policies.agreements import Agreement
from flexgate.policies.compiled.agreements import ANCHOR, AssigneeAgreements, CompiledAgreement, compile_agreement
from flexgate.policies.documents import Expert, ExpertSet, Grade, KeyRecord, Quota, Role, Tenant
from flexgate.policies.errors import SnapshotInvalid
from flexgate.policies.ids import ExpertId, SetId, TenantId


@dataclass(frozen=True, slots=True)
class TenantRules:
    """A tenant as the decision reads it: every set expanded.

    `listed` and `unlisted` override the catalogue; `Snapshot.hidden_from` says what is hidden. Of what is required
    of its requests they may ignore `may_ignore`.
    """

    id: TenantId
    name: str
    deny_list: bool
    named: frozenset[ExpertId]
    listed: frozenset[ExpertId]
    unlisted: frozenset[ExpertId]
    default_experts: frozenset[ExpertId] | None
    may_ignore: frozenset[ExpertId]
    min_grade: Grade | None
    assignees: tuple[str, ...]
    purposes: frozenset[str]
    regions: frozenset[str]
    archived: bool
    quota: Quota
    key_quotas: Mapping[str, Quota]


@dataclass(frozen=True, slots=True)
class Compiler:
    """Compile documents against the catalogue and its sets. Every method raises `SnapshotInvalid`."""

    experts: Mapping[ExpertId, Expert]
    sets: Mapping[SetId, frozenset[ExpertId]]

    def members(self, document: ExpertSet) -> frozenset[ExpertId]:
        """The experts of a set."""
        return self._known(f"set {document.id}", document.experts)

    def rules(self, tenant: Tenant) -> TenantRules:
        """A tenant's rules."""
        where = f"tenant {tenant.id}"
        return TenantRules(
            id=tenant.id,
            name=tenant.name,
            deny_list=tenant.mode == "deny_list",
            named=self._expand(where, tenant.expert_ids),
            listed=self._expand(where, tenant.listed),
            unlisted=self._expand(where, tenant.hidden),
            default_experts=None if tenant.default_experts is None else self._expand(where, tenant.default_experts),
            min_grade=tenant.min_grade,
            may_ignore=ANCHOR if tenant.anchor_optional else frozenset(),
            assignees=(
                "everyone",
                *(f"group:{group}" for group in sorted(tenant.groups)),
                f"tenant:{tenant.id}",
            ),
            purposes=tenant.purposes,
            regions=tenant.regions,
            archived=tenant.archived,
            quota=tenant.quota,
            key_quotas=tenant.key_quotas,
        )

    def by_assignee(self, agreements: Iterable[Agreement]) -> dict[str, AssigneeAgreements]:
        """Agreements by assignee, each cut down to experts that its owner owns."""
        compiled: dict[str, list[tuple[ExpertId, CompiledAgreement]]] = {}
        for agreement in agreements:
            compiled.setdefault(agreement.assignee, []).extend(self.compile(agreement))
        return {assignee: AssigneeAgreements.of(found) for assignee, found in compiled.items() if found}

    def compile(self, agreement: Agreement) -> Iterable[tuple[ExpertId, CompiledAgreement]]:
        """Compile one agreement for each of its experts; none if it permits with duties that are not executed."""
        if agreement.effect == "permit" and not agreement.executed:
            return
        compiled = compile_agreement(agreement)
        for expert in self._expand(f"agreement {agreement.id}", agreement.experts):
            if self.experts[expert].owner == agreement.owner:
                yield expert, compiled

    def _expand(self, where: str, references: frozenset[str]) -> frozenset[ExpertId]:
        if references <= self.experts.keys():
            return cast(frozenset[ExpertId], references)
        plain = {ExpertId(name) for name in references if not name.startswith("set:")}
        members = set(self._known(where, plain))
        for name in references:
            if name.startswith("set:"):
                if SetId(name) not in self.sets:
                    raise SnapshotInvalid(f"{where} names the unknown set {name!r}")
                members |= self.sets[SetId(name)]
        return frozenset(members)

    def _known(self, where: str, names: Iterable[ExpertId]) -> frozenset[ExpertId]:
        members = frozenset(names)
        unknown = sorted(members - self.experts.keys())
        if unknown:
            raise SnapshotInvalid(f"{where} names the unknown expert {unknown[0]!r}")
        return members


def keys_by_digest(
    keys: Iterable[KeyRecord], tenants: Mapping[TenantId, TenantRules], found: dict[bytes, KeyRecord]
) -> dict[bytes, KeyRecord]:
    """`found` with `keys`, which replace those with their ids; raises `SnapshotInvalid`."""
    for key in keys:
        if (key.role is Role.TENANT) != (key.tenant_id is not None):
            raise SnapshotInvalid(f"key {key.key_id!r}: exactly the tenants' keys name a tenant")
        if key.tenant_id is not None and key.tenant_id not in tenants:
            raise SnapshotInvalid(f"key {key.key_id!r} names the unknown tenant {key.tenant_id!r}")
        if (key.role is Role.OWNER) != (key.owner_id is not None):
            raise SnapshotInvalid(f"key {key.key_id!r}: exactly the owners' keys name an owner")
        if found.setdefault(key.sha256, key).key_id != key.key_id:
            raise SnapshotInvalid(f"key {key.key_id!r} has the digest of another key")
        found[key.sha256] = key
    return found
