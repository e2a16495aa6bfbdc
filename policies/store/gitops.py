"""The policy as one file: export it, see what applying one would change, apply it.

A file names tenants, sets, agreements, and which experts are hidden or required. Experts themselves come from
the checkpoint, and keys are never in a file. What a file does not name is left alone, unless it is
applied with `prune`: then agreements and sets are removed, and tenants archived.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ValidationError

from flexgate.policies.agreements import STORED, Agreement, Document, ListOf, SetOf
from flexgate.policies.documents import Expert, ExpertSet, Tenant
from flexgate.policies.errors import ChangeRefused, InvalidName
from flexgate.policies.ids import ExpertIdField
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.store import checks
from flexgate.policies.store.change import Change
from flexgate.policies.store.database import reading
from flexgate.policies.store.documents import changed, first_mistake, to_json
from flexgate.policies.store.history import changes_back, documents_after
from flexgate.policies.store.revisions import ObjectChange
from flexgate.policies.store.store import Store


def _once_each(documents: tuple[Any, ...]) -> tuple[Any, ...]:
    seen: set[str] = set()
    for document in documents:
        if document.id in seen:
            raise InvalidName(f"{document.id!r} is given twice")
        seen.add(document.id)
    return documents


class PolicyFile(Document):
    """The file's content. Its JSON schema is `PolicyFile.model_json_schema()`."""

    format: Literal["flexgate-policy/v1"]
    hidden_experts: SetOf[ExpertIdField] | None = None
    required_experts: SetOf[ExpertIdField] | None = None
    expert_sets: Annotated[ListOf[ExpertSet], AfterValidator(_once_each)] = ()
    tenants: Annotated[ListOf[Tenant], AfterValidator(_once_each)] = ()
    agreements: Annotated[ListOf[Agreement], AfterValidator(_once_each)] = ()


class _DryRun(Exception):
    """Ends a transaction whose changes are only to be looked at."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan


def parse_file(content: object, *, stored: bool = False) -> PolicyFile:
    """Parsed YAML or JSON as a policy file; raises `ChangeRefused` that names the first mistake.

    Args:
        stored: some of it may be stored already, in words that no list has any more. What is new of it is refused
            where it is put.
    """
    try:
        return PolicyFile.model_validate(content, context=STORED if stored else None)
    except ValidationError as error:
        raise ChangeRefused(first_mistake(error, "the file")) from None


def export(store: Store, version: int | None = None) -> dict[str, Any]:
    """The policy as a file's content, in the same order every time, without defaults.

    Args:
        version: as it was then; None for now.

    Raises:
        ChangeRefused: there never was that version.
    """
    with reading(store.engine) as connection:
        changes = [] if version is None else changes_back(connection, version)
        experts = documents_after(connection, changes, Expert)
        return {
            "format": "flexgate-policy/v1",
            "hidden_experts": sorted(e.id for e in experts if e.visibility == "hidden"),
            "required_experts": sorted(e.id for e in experts if e.required),
            "expert_sets": _sparse(documents_after(connection, changes, ExpertSet)),
            "tenants": _sparse(documents_after(connection, changes, Tenant)),
            "agreements": _sparse(documents_after(connection, changes, Agreement)),
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """The changes of applying a file, and the policy before and after."""

    changes: list[ObjectChange]
    current: Snapshot
    proposed: Snapshot


def plan(store: Store, file: PolicyFile, *, prune: bool = False) -> Plan:
    """Check everything that `apply` would do, and keep nothing."""
    try:
        with store.change(actor="plan", at=0.0) as change:
            current = change.snapshot()
            _put_all(change, file, prune=prune)
            change.settle()
            raise _DryRun(Plan(change.changes, current, change.snapshot()))
    except _DryRun as dry_run:
        return dry_run.plan


def apply(store: Store, file: PolicyFile, *, actor: str, at: float, prune: bool = False) -> list[ObjectChange]:
    """Apply a file as one revision; returns what changed."""
    with store.change(actor=actor, note="apply file", at=at, urgent=True) as change:
        _put_all(change, file, prune=prune)
    return change.changes


def _put_all(change: Change, file: PolicyFile, *, prune: bool) -> None:
    _set_experts(change, file.hidden_experts, file.required_experts)
    for expert_set in file.expert_sets:
        change.put(expert_set)
    for tenant in file.tenants:
        change.put(tenant)
    for agreement in file.agreements:
        if not _is_stored(change, agreement):
            change.put(agreement)
    if prune:
        _prune(change, file)


def _is_stored(change: Change, agreement: Agreement) -> bool:
    """Whether it has just these terms, also where a change of a set has given it a higher version."""
    stored = change.get(Agreement, agreement.id)
    if stored is None or stored.version < agreement.version:
        return False
    return stored == agreement.model_copy(update={"version": stored.version})


def _set_experts(
    change: Change, hidden: frozenset[ExpertIdField] | None, required: frozenset[ExpertIdField] | None
) -> None:
    """Set which experts are hidden and which are required, each at once: none is both in between."""
    experts = change.all(Expert)
    for field, named in (("hidden_experts", hidden), ("required_experts", required)):
        unknown = (named or frozenset()) - {expert.id for expert in experts}
        if unknown:
            raise checks.unknown(field, "expert", min(unknown), experts)
    for expert in experts:
        fields: dict[str, Any] = {}
        if hidden is not None:
            fields["visibility"] = "hidden" if expert.id in hidden else "listed"
        if required is not None:
            fields["required"] = expert.id in required
        change.put(expert.model_copy(update=fields))


def _prune(change: Change, file: PolicyFile) -> None:
    agreements = {agreement.id for agreement in file.agreements}
    for agreement in change.all(Agreement):
        if agreement.id not in agreements:
            change.remove(Agreement, agreement.id)
    tenants = {tenant.id for tenant in file.tenants}
    for tenant in change.all(Tenant):
        if tenant.id not in tenants:
            change.put(changed(Tenant(id=tenant.id, name=tenant.id, archived=True), {"name": tenant.name}))
    sets = {expert_set.id for expert_set in file.expert_sets}
    for expert_set in change.all(ExpertSet):
        if expert_set.id not in sets:
            change.remove(ExpertSet, expert_set.id)


def _sparse(documents: list[Any]) -> list[dict[str, Any]]:
    rows = []
    for document in sorted(documents, key=lambda d: str(d.id)):
        set_fields = document.model_dump(mode="json", exclude_defaults=True)
        rows.append({name: v for name, v in to_json(document).items() if name in set_fields})
    return rows
