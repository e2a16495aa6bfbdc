"""Incremental snapshots: only what a change touches is compiled again.

The result equals `Snapshot.build` of all documents. It costs what the change costs, and a plain copy
of each mapping.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Generic, NamedTuple, TypeVar

from flexgate.policies.agreements import Agreement
from flexgate.policies.compiled.agreements import AssigneeAgreements, CompiledAgreement
from flexgate.policies.compiled.compiler import Compiler, keys_by_digest
from flexgate.policies.documents import Expert, ExpertSet, KeyRecord, Tenant
from flexgate.policies.errors import SnapshotInvalid
from flexgate.policies.ids import ExpertId, SetId
from flexgate.policies.snapshot import Snapshot

D = TypeVar("D", Expert, ExpertSet, Tenant, Agreement)


class Edit(NamedTuple, Generic[D]):
    """One document before and after; None where it does not exist. Equal ones are compiled again."""

    id: str
    before: D | None
    after: D | None


def revise(
    snapshot: Snapshot,
    *,
    policy_version: int,
    made: float,
    experts: Iterable[Edit[Expert]] = (),
    sets: Iterable[Edit[ExpertSet]] = (),
    tenants: Iterable[Edit[Tenant]] = (),
    agreements: Iterable[Edit[Agreement]] = (),
    keys: Iterable[KeyRecord] = (),
    revocation_epochs: Mapping[str, int] | None = None,
) -> Snapshot:
    """`snapshot` after edits, each kind's in their order, with new or changed `keys` and all `revocation_epochs`.

    Among the edits must be the tenants and agreements that name a set which changed, and whatever named
    an expert that went or changed its owner: the store refuses either while something names the expert.
    Raises `SnapshotInvalid` when the documents do not fit together.
    """
    catalogue = _experts(snapshot.experts.copy(), experts)
    expanded, rules = snapshot.sets.copy(), snapshot.tenants.copy()
    for edit_of_set in _net(sets).values():
        expanded.pop(SetId(edit_of_set.id), None)
        if edit_of_set.after is not None:
            expanded[edit_of_set.after.id] = Compiler(catalogue, {}).members(edit_of_set.after)
    compiler = Compiler(catalogue, expanded)
    for edit in _net(tenants).values():
        if edit.after is None:
            raise SnapshotInvalid(f"tenant {edit.id!r} is gone; tenants are archived, not removed")
        rules[edit.after.id] = compiler.rules(edit.after)
    return replace(
        snapshot,
        policy_version=policy_version,
        made=made,
        experts=MappingProxyType(catalogue),
        sets=MappingProxyType(expanded),
        tenants=MappingProxyType(rules),
        agreements=MappingProxyType(_by_assignee(snapshot.agreements.copy(), compiler, _net(agreements))),
        keys=MappingProxyType(keys_by_digest(keys, rules, snapshot.keys.copy())),
        revocation_epochs=snapshot.revocation_epochs
        if revocation_epochs is None
        else MappingProxyType(dict(revocation_epochs)),
    )


def _experts(experts: dict[ExpertId, Expert], edits: Iterable[Edit[Expert]]) -> dict[ExpertId, Expert]:
    for edit in edits:
        if edit.after is None:
            experts.pop(ExpertId(edit.id), None)
        else:
            experts[edit.after.id] = edit.after
    return experts


def _by_assignee(
    known: dict[str, AssigneeAgreements], compiler: Compiler, edits: Mapping[str, Edit[Agreement]]
) -> dict[str, AssigneeAgreements]:
    """`known` with every touched assignee's agreements replaced."""
    compiled: dict[str, list[tuple[ExpertId, CompiledAgreement]]] = {}
    documents = (document for edit in edits.values() for document in (edit.before, edit.after))
    for assignee in {document.assignee for document in documents if document is not None}:
        before = known.pop(assignee).entries() if assignee in known else ()
        compiled[assignee] = [(expert, one) for expert, one in before if one.agreement_id not in edits]
    for edit in edits.values():
        if edit.after is not None:
            compiled[edit.after.assignee].extend(compiler.compile(edit.after))
    return known | {assignee: AssigneeAgreements.of(found) for assignee, found in compiled.items() if found}


def _net(edits: Iterable[Edit[D]]) -> dict[str, Edit[D]]:
    """The first state and the last of each document."""
    found: dict[str, Edit[D]] = {}
    for edit in edits:
        before = found[edit.id].before if edit.id in found else edit.before
        found[edit.id] = Edit(edit.id, before, edit.after)
    return found
