"""One immutable picture of the whole policy, indexed for decisions and for key lookup.

A process holds one `Snapshot` and swaps it as a whole; nothing is cached per object. The
documents (`Tenant`, `Agreement`, …) are compiled when the snapshot is built: sets are expanded,
an agreement is cut down to experts that its owner owns, and its times become Unix seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, TypeVar, cast

from flexgate.policies.clauses import Clause, ClauseTable, compile_clause
from flexgate.policies.errors import SnapshotInvalid
from flexgate.policies.reasons import Standard, standard
from flexgate.policies.tenants import Expert, ExpertSet, KeyRecord, Quota, Role, Tenant
from flexgate.policies.terms import PUBLIC, Agreement, Document, ExpertId, SetId, TenantId

_Id = TypeVar("_Id", bound=str)
_Document = TypeVar("_Document", bound=Document)
_NOBODY: Final[frozenset[ExpertId]] = frozenset()


Listing = tuple[ExpertId, bool, Standard]


@dataclass(frozen=True, slots=True)
class TenantRules:
    """A tenant as the decision reads it: every set expanded."""

    id: TenantId
    name: str
    deny_list: bool
    named: frozenset[ExpertId]
    hidden: frozenset[ExpertId]
    standing: frozenset[ExpertId] | None
    anchor_optional: bool
    assignees: tuple[str, ...]
    purposes: frozenset[str]
    regions: frozenset[str]
    archived: bool
    quota: Quota
    key_quotas: Mapping[str, Quota]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Build with `Snapshot.build`; every collection in it is read-only.

    Both `unlimited[assignee][expert]` and `limited[assignee][expert]` are agreements between one
    assignee and one expert: those that permit whatever a request declares, and all others, by
    start. `dates[assignee]` are the moments at which any of them starts or ends, in order.
    `catalogue` is made of `experts`: what a decision asks of each.
    """

    policy_version: int
    experts: Mapping[ExpertId, Expert]
    sets: Mapping[SetId, frozenset[ExpertId]]
    tenants: Mapping[TenantId, TenantRules]
    unlimited: ClauseTable
    limited: ClauseTable
    dates: Mapping[str, tuple[float, ...]]
    keys: Mapping[bytes, KeyRecord]
    catalogue: tuple[Listing, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        catalogue = tuple((expert.id, expert.live, standard(expert)) for expert in self.experts.values())
        object.__setattr__(self, "catalogue", catalogue)

    @classmethod
    def build(
        cls,
        *,
        policy_version: int,
        experts: Iterable[Expert],
        tenants: Iterable[Tenant] = (),
        agreements: Iterable[Agreement] = (),
        sets: Iterable[ExpertSet] = (),
        keys: Iterable[KeyRecord] = (),
    ) -> Snapshot:
        """Compile the documents; raises `SnapshotInvalid` when they do not fit together.

        The order of `experts` is the catalogue order of every answer. Equal documents given twice
        count once; different ones under one id are refused.
        """
        catalogue = _by_id("expert", ((e.id, e) for e in experts))
        if PUBLIC not in catalogue or catalogue[PUBLIC].visibility == "hidden":
            raise SnapshotInvalid("the catalogue needs a listed expert 'public'")
        expanded = {
            set_id: _known(f"set {set_id}", document.experts, catalogue)
            for set_id, document in _by_id("set", ((s.id, s) for s in sets)).items()
        }
        hidden = frozenset(e.id for e in catalogue.values() if e.visibility == "hidden")
        scope = _Scope(catalogue, hidden, expanded)
        known_tenants = _by_id("tenant", ((t.id, t) for t in tenants))
        rules = {id_: scope.rules(tenant) for id_, tenant in known_tenants.items()}
        terms = _by_id("agreement", ((a.id, a) for a in agreements))
        unlimited, limited = scope.clauses(terms.values())
        return cls(
            policy_version=policy_version,
            experts=MappingProxyType(catalogue),
            sets=MappingProxyType(expanded),
            tenants=MappingProxyType(rules),
            unlimited=unlimited,
            limited=limited,
            dates=MappingProxyType({name: _dates(row) for name, row in limited.items()}),
            keys=MappingProxyType(_keys_by_digest(keys, rules)),
        )


@dataclass(frozen=True, slots=True)
class _Scope:
    catalogue: Mapping[ExpertId, Expert]
    hidden: frozenset[ExpertId]
    sets: Mapping[SetId, frozenset[ExpertId]]

    def expand(self, where: str, references: frozenset[str]) -> frozenset[ExpertId]:
        if not references:
            return _NOBODY
        if references <= self.catalogue.keys():
            return cast(frozenset[ExpertId], references)
        plain = {ExpertId(name) for name in references if not name.startswith("set:")}
        members = set(_known(where, plain, self.catalogue))
        for name in references:
            if name.startswith("set:"):
                if SetId(name) not in self.sets:
                    raise SnapshotInvalid(f"{where} names the unknown set {name!r}")
                members |= self.sets[SetId(name)]
        return frozenset(members)

    def rules(self, tenant: Tenant) -> TenantRules:
        where = f"tenant {tenant.id}"
        listed = self.expand(where, tenant.listed)
        hidden = (self.hidden - listed) | self.expand(where, tenant.hidden)
        return TenantRules(
            id=tenant.id,
            name=tenant.name,
            deny_list=tenant.mode == "deny_list",
            named=self.expand(where, tenant.expert_ids),
            hidden=hidden or _NOBODY,
            standing=None if tenant.standing is None else self.expand(where, tenant.standing),
            anchor_optional=tenant.anchor_optional,
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

    def clauses(self, agreements: Iterable[Agreement]) -> tuple[ClauseTable, ClauseTable]:
        """The unlimited and the limited ones."""
        unlimited: dict[str, dict[ExpertId, tuple[Clause, ...]]] = {}
        limited: dict[str, dict[ExpertId, tuple[Clause, ...]]] = {}
        for agreement in sorted(agreements, key=lambda a: (a.starts, a.id)):
            clause = compile_clause(agreement)
            index = unlimited if clause.unlimited else limited
            by_expert = index.setdefault(agreement.assignee, {})
            for expert in self.expand(f"agreement {agreement.id}", agreement.experts):
                if self.catalogue[expert].owner == agreement.owner:
                    by_expert[expert] = (*by_expert.get(expert, ()), clause)
        return _read_only(unlimited), _read_only(limited)


def _read_only(index: dict[str, dict[ExpertId, tuple[Clause, ...]]]) -> ClauseTable:
    return MappingProxyType({name: MappingProxyType(row) for name, row in index.items()})


def _dates(row: Mapping[ExpertId, tuple[Clause, ...]]) -> tuple[float, ...]:
    edges = {edge for clauses in row.values() for c in clauses for edge in (c.starts, c.ends)}
    return tuple(sorted(edges - {-math.inf, math.inf}))


def _by_id(kind: str, pairs: Iterable[tuple[_Id, _Document]]) -> dict[_Id, _Document]:
    found: dict[_Id, _Document] = {}
    for id_, document in pairs:
        known = found.setdefault(id_, document)
        if known is not document and known != document:
            raise SnapshotInvalid(f"two different versions of {kind} {id_!r}")
    return found


def _known(where: str, names: Iterable[ExpertId], catalogue: Mapping[ExpertId, Expert]) -> frozenset[ExpertId]:
    members = frozenset(names)
    unknown = sorted(members - catalogue.keys())
    if unknown:
        raise SnapshotInvalid(f"{where} names the unknown expert {unknown[0]!r}")
    return members


def _keys_by_digest(keys: Iterable[KeyRecord], tenants: Mapping[TenantId, TenantRules]) -> dict[bytes, KeyRecord]:
    found: dict[bytes, KeyRecord] = {}
    for key in keys:
        if (key.role is Role.TENANT) != (key.tenant_id is not None):
            raise SnapshotInvalid(f"key {key.key_id!r}: exactly the tenants' keys name a tenant")
        if key.tenant_id is not None and key.tenant_id not in tenants:
            raise SnapshotInvalid(f"key {key.key_id!r} names the unknown tenant {key.tenant_id!r}")
        if (key.role is Role.OWNER) != (key.owner_id is not None):
            raise SnapshotInvalid(f"key {key.key_id!r}: exactly the owners' keys name an owner")
        known = found.setdefault(key.sha256, key)
        if known is not key and known != key:
            raise SnapshotInvalid(f"key {key.key_id!r} has the digest of another key")
    return found
