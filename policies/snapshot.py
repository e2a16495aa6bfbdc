"""The whole policy at one version, immutable, indexed for decisions and key lookup.

A process holds one `Snapshot` and swaps it as a whole; nothing is cached per object. The
documents (`Tenant`, `Agreement`, …) are compiled when the snapshot is built: sets are expanded,
an agreement is cut down to experts that its owner owns, and its times become Unix seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Self, TypeVar

from flexgate.policies.agreements import Agreement, Document
from flexgate.policies.compiled.agreements import AssigneeAgreements
from flexgate.policies.compiled.compiler import Compiler, TenantRules, keys_by_digest
from flexgate.policies.documents import Expert, ExpertSet, Grade, KeyRecord, Tenant
from flexgate.policies.errors import SnapshotInvalid
from flexgate.policies.ids import PUBLIC, ExpertId, SetId, TenantId
from flexgate.policies.reasons import Standard, standard

_Id = TypeVar("_Id", bound=str)
_Document = TypeVar("_Document", bound=Document)

_NEVER: Mapping[ExpertId, float] = MappingProxyType({})
Listing = tuple[ExpertId, bool, Standard]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Build with `Snapshot.build`; every collection in it is read-only.

    `made` is when its version was made, in Unix seconds: two histories that have a version in
    common differ in it. `agreements` are by assignee. `catalogue` is made of `experts`:
    what a decision asks of each; `hidden` are those that only some tenants see, `required`
    those that no request leaves out, `public` among them; `empty_layers` has the layers that an expert has nothing in,
    of those that have such. `revocation_epochs` is the weights epoch of each
    expert's last revocation: what was loaded before it must not be served. `grades` has each expert's grade.
    """

    policy_version: int
    made: float
    experts: MappingProxyType[ExpertId, Expert]
    sets: MappingProxyType[SetId, frozenset[ExpertId]]
    tenants: MappingProxyType[TenantId, TenantRules]
    agreements: MappingProxyType[str, AssigneeAgreements]
    keys: MappingProxyType[bytes, KeyRecord]
    revocation_epochs: MappingProxyType[str, int] = field(default_factory=lambda: MappingProxyType({}))
    catalogue: tuple[Listing, ...] = field(init=False, repr=False, compare=False)
    hidden: frozenset[ExpertId] = field(init=False, repr=False, compare=False)
    grades: tuple[tuple[ExpertId, Grade], ...] = field(init=False, repr=False, compare=False)
    required: frozenset[ExpertId] = field(init=False, repr=False, compare=False)
    empty_layers: Mapping[ExpertId, frozenset[int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if PUBLIC not in self.experts or self.experts[PUBLIC].visibility == "hidden":
            raise SnapshotInvalid("the catalogue needs a listed expert 'public'")
        catalogue = tuple((expert.id, expert.live, standard(expert)) for expert in self.experts.values())
        object.__setattr__(self, "catalogue", catalogue)
        grades = tuple((expert.id, expert.grade) for expert in self.experts.values())
        object.__setattr__(self, "grades", grades)
        hidden = frozenset(expert.id for expert in self.experts.values() if expert.visibility == "hidden")
        object.__setattr__(self, "hidden", hidden)
        required = frozenset(expert.id for expert in self.experts.values() if expert.required)
        object.__setattr__(self, "required", required | {PUBLIC})
        empty = {expert.id: expert.empty_layers for expert in self.experts.values() if expert.empty_layers}
        object.__setattr__(self, "empty_layers", empty)

    @classmethod
    def build(
        cls,
        *,
        policy_version: int,
        made: float = 0.0,
        experts: Iterable[Expert],
        tenants: Iterable[Tenant] = (),
        agreements: Iterable[Agreement] = (),
        sets: Iterable[ExpertSet] = (),
        keys: Iterable[KeyRecord] = (),
        revocation_epochs: Mapping[str, int] = MappingProxyType({}),
    ) -> Self:
        """Compile the documents; raises `SnapshotInvalid` when they do not fit together.

        The order of `experts` is the catalogue order of every answer. Equal documents given twice
        count once; different ones under one id are refused.
        """
        catalogue = _by_id("expert", ((e.id, e) for e in experts))
        documents = _by_id("set", ((s.id, s) for s in sets))
        expanded = {id_: Compiler(catalogue, {}).members(document) for id_, document in documents.items()}
        compiler = Compiler(catalogue, expanded)
        rules = {id_: compiler.rules(tenant) for id_, tenant in _by_id("tenant", ((t.id, t) for t in tenants)).items()}
        by_id = _by_id("agreement", ((a.id, a) for a in agreements))
        return cls(
            policy_version=policy_version,
            made=made,
            experts=MappingProxyType(catalogue),
            sets=MappingProxyType(expanded),
            tenants=MappingProxyType(rules),
            agreements=MappingProxyType(compiler.by_assignee(by_id.values())),
            keys=MappingProxyType(keys_by_digest(keys, rules, {})),
            revocation_epochs=MappingProxyType(dict(revocation_epochs)),
        )

    def hidden_from(self, tenant: TenantRules, now: float) -> frozenset[ExpertId]:
        """The experts that do not exist for a tenant; one that is required of it, or will be, is no such."""
        return self.concealed(tenant, now)[0]

    def concealed(self, tenant: TenantRules, now: float) -> tuple[frozenset[ExpertId], Mapping[ExpertId, float]]:
        """What is hidden from a tenant, and what else would be, if agreements did not require it until then."""
        hidden = (self.hidden - tenant.listed) | tenant.unlisted if self.hidden else tenant.unlisted
        if not hidden:
            return hidden, _NEVER
        found = (of_one.required for name in tenant.assignees if (of_one := self.agreements.get(name)))
        shown: dict[ExpertId, float] = {}
        for required in found:
            for id_ in hidden & required.keys():
                shown[id_] = max(shown.get(id_, now), *(one.ends for one in required[id_]))
        needed = {id_: until for id_, until in shown.items() if now < until}
        return hidden.difference(self.required, needed), needed


def _by_id(kind: str, pairs: Iterable[tuple[_Id, _Document]]) -> dict[_Id, _Document]:
    found: dict[_Id, _Document] = {}
    for id_, document in pairs:
        known = found.setdefault(id_, document)
        if known is not document and known != document:
            raise SnapshotInvalid(f"two different versions of {kind} {id_!r}")
    return found
