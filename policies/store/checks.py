"""Checks of a change, which keep the stored policy consistent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from sqlalchemy import Connection, func, select

from flexgate.policies.agreements import Agreement, Document, require_executed
from flexgate.policies.documents import Expert, ExpertSet, Tenant, require_title
from flexgate.policies.errors import ChangeRefused, InvalidName
from flexgate.policies.ids import PUBLIC
from flexgate.policies.store import schema
from flexgate.policies.store.documents import PolicyDocument, read_all, read_one
from flexgate.policies.store.revisions import agreement_versions
from flexgate.policies.vocabulary import parse_currency, parse_license_expression, parse_region

MOST_REQUIREMENTS: Final = 64
"""Agreements that require something of one assignee: each decision about it that is not kept reads them."""
MOST_SETS: Final = 2_000
_MOST_NAMED: Final = 20


def check_put(
    connection: Connection, document: PolicyDocument, before: PolicyDocument | None, *, restored: bool = False
) -> None:
    """Raise `ChangeRefused` unless everything that the document names exists and fits.

    What is `restored` may require what is not loaded: no rollback, which may take a right away, waits for an expert.
    """
    if isinstance(document, Agreement):
        _check_agreement(connection, document)
        if not restored:
            _check_loaded(connection, document, before)
            _check_requirements(connection, document, before)
    elif isinstance(document, Expert):
        _check_expert(connection, document, before, restored=restored)
    elif isinstance(document, ExpertSet):
        if before is None and not restored:
            _check_sets(connection)
        for expert in sorted(document.experts):
            _owner(connection, f"set {document.id!r}", expert)
    else:
        for reference in _references(document):
            _owners(connection, f"project {document.id!r}", reference)


def check_vocabulary(document: PolicyDocument, before: PolicyDocument | None) -> None:
    """Raise `ChangeRefused` for a word that is not in today's lists and that the document did not have before."""
    try:
        if isinstance(document, Tenant):
            _check_tenant(document, before if isinstance(before, Tenant) else None)
        if isinstance(document, Agreement):
            _check_new_agreement(document, before if isinstance(before, Agreement) else None)
    except InvalidName as error:
        raise ChangeRefused(f"{_name_of(document)}: {error}") from None


def _check_tenant(tenant: Tenant, before: Tenant | None) -> None:
    _check_regions(tenant.regions, before.regions if before else None)
    if before is None or tenant.name != before.name:
        require_title(tenant.name)


def _check_new_agreement(agreement: Agreement, before: Agreement | None) -> None:
    _check_regions(agreement.regions, before.regions if before else None)
    license_ = agreement.license_expression
    if license_ is not None and (before is None or license_ != before.license_expression):
        parse_license_expression(license_)
    if before is None or agreement.duties != before.duties:
        require_executed(agreement.duties, agreement.effect)
    for currency in sorted(_currencies(agreement) - (_currencies(before) if before else set())):
        parse_currency(currency)


def _currencies(agreement: Agreement) -> set[str]:
    return {duty.currency for duty in agreement.duties if duty.kind == "compensate"}


def _check_regions(regions: frozenset[str] | None, known: frozenset[str] | None) -> None:
    for region in sorted((regions or frozenset()) - (known or frozenset())):
        parse_region(region)


def _name_of(document: PolicyDocument) -> str:
    kind = "project" if isinstance(document, Tenant) else type(document).__name__.lower()
    return f"{kind} {document.id!r}"


def check_remove(connection: Connection, kind: type[Document], id_: str) -> None:
    """Raise `ChangeRefused` if something still names the document."""
    if kind is Tenant:
        raise ChangeRefused("a project is archived, not removed")
    if kind is Agreement:
        return
    if id_ == PUBLIC:
        raise ChangeRefused("'public' is every model's anchor and cannot be removed")
    for user in _users(connection, id_):
        raise ChangeRefused(f"{user} still names {id_!r}: change it first")


def _check_agreement(connection: Connection, agreement: Agreement) -> None:
    for reference in sorted(agreement.experts):
        owners = _owners(connection, f"agreement {agreement.id!r}", reference, agreement.owner)
        if None in owners:
            raise ChangeRefused(
                f"agreement {agreement.id!r} names {reference!r}, which has no owner who could permit or prohibit it: "
                "leave it out; the projects' lists of experts decide about it"
            )
        if foreign := {owner for owner in owners if owner is not None} - {agreement.owner}:
            raise ChangeRefused(
                f"agreement {agreement.id!r} of owner {agreement.owner!r} names {reference!r}, which belongs "
                f"to {min(foreign)!r}: name the owner's own experts only"
            )
    kind, _, name = agreement.assignee.partition(":")
    if kind == "tenant" and read_one(connection, Tenant, name) is None:
        raise ChangeRefused(f"agreement {agreement.id!r} names the unknown project {name!r}: create it first")
    stored = agreement_versions(connection, agreement.id)
    newest = max((one.version for one in stored), default=0)
    if any(one.version >= agreement.version and one != agreement for one in stored):
        raise ChangeRefused(
            f"agreement {agreement.id!r} was stored as version {newest}: a changed agreement needs "
            f"version {newest + 1} or a higher one"
        )


def _check_loaded(connection: Connection, agreement: Agreement, before: PolicyDocument | None) -> None:
    """Refuse to begin to require what no server has; what was required and is revoked meanwhile stays required."""
    if agreement.effect == "require" and not (isinstance(before, Agreement) and _is_within(agreement, before)):
        for reference in sorted(agreement.experts):
            check_required(connection, agreement, _members(connection, f"agreement {agreement.id!r}", reference))


def _check_requirements(connection: Connection, agreement: Agreement, before: PolicyDocument | None) -> None:
    """Refuse one requirement too many: a decision reads all that are about a project."""
    if agreement.effect != "require":
        return
    if isinstance(before, Agreement) and (before.effect, before.assignee) == ("require", agreement.assignee):
        return
    document = schema.agreements.c.document
    wanted = {"effect": "require", "assignee": agreement.assignee}
    where = [document[name].as_string() == value for name, value in wanted.items()]
    number = connection.execute(select(func.count()).select_from(schema.agreements).where(*where)).scalar_one()
    if number >= MOST_REQUIREMENTS:
        raise ChangeRefused(
            f"{MOST_REQUIREMENTS} agreements require something of {agreement.assignee!r} already: "
            "name several experts, or a set, in one of them"
        )


def _check_sets(connection: Connection) -> None:
    number = connection.execute(select(func.count()).select_from(schema.expert_sets)).scalar_one()
    if number >= MOST_SETS:
        raise ChangeRefused(f"there are {MOST_SETS} sets already: delete one")


def check_required(connection: Connection, agreement: Agreement, begun: Iterable[str]) -> None:
    """Raise `ChangeRefused` if an agreement begins to require an expert that is not loaded."""
    for id_ in sorted(begun) if agreement.effect == "require" else ():
        expert = read_one(connection, Expert, id_)
        if expert is not None and not expert.live:
            raise ChangeRefused(
                f"agreement {agreement.id!r} requires {id_!r}, which is not loaded: the requests that it is about "
                "would be refused; load it first"
            )


def _is_within(agreement: Agreement, before: Agreement) -> bool:
    """Whether it reaches no request that it did not reach before."""
    return (
        (agreement.effect, agreement.assignee) == (before.effect, before.assignee)
        and agreement.experts <= before.experts
        and before.starts <= agreement.starts
        and agreement.ends <= before.ends
        and _holds(before.purposes, agreement.purposes)
        and _holds(before.regions, agreement.regions)
    )


def _holds(words: frozenset[str] | None, others: frozenset[str] | None) -> bool:
    return words is None or (others is not None and others <= words)


def _check_expert(connection: Connection, expert: Expert, before: PolicyDocument | None, *, restored: bool) -> None:
    if (expert.required or expert.id == PUBLIC) and expert.visibility == "hidden":
        raise ChangeRefused(f"{expert.id!r} is required in every answer and cannot be hidden")
    begins = expert.required and not (isinstance(before, Expert) and before.required)
    if begins and not expert.live and not restored:
        raise ChangeRefused(
            f"{expert.id!r} is not loaded: if it were required, every request would be refused; load it first"
        )
    if isinstance(before, Expert) and before.owner != expert.owner:
        for user in _users(connection, expert.id):
            raise ChangeRefused(f"{user} names {expert.id!r} with its present owner: change that first")


def _references(tenant: Tenant) -> list[str]:
    named = tenant.expert_ids | tenant.hidden | tenant.listed | (tenant.default_experts or frozenset())
    return sorted(named)


def _owners(connection: Connection, who: str, reference: str, proposed: str | None = None) -> set[str | None]:
    """The owners of an expert or of a set's. If there is none, the refusal proposes those of one owner, or all."""
    return {_owner(connection, who, expert, proposed) for expert in _members(connection, who, reference, proposed)}


def _members(connection: Connection, who: str, reference: str, proposed: str | None = None) -> Iterable[str]:
    """The expert that a reference names, or those of the set."""
    if not reference.startswith("set:"):
        return (reference,)
    members = read_one(connection, ExpertSet, reference)
    if members is None:
        own = {expert.id for expert in _of(connection, proposed)}
        raise unknown(who, "set", reference, [one for one in read_all(connection, ExpertSet) if one.experts <= own])
    return members.experts


def _owner(connection: Connection, who: str, expert_id: str, proposed: str | None = None) -> str | None:
    expert = read_one(connection, Expert, expert_id)
    if expert is None:
        raise unknown(who, "expert", expert_id, _of(connection, proposed))
    return expert.owner


def _of(connection: Connection, owner: str | None) -> list[Expert]:
    return [expert for expert in read_all(connection, Expert) if owner in (None, expert.owner)]


def unknown(who: str, what: str, name: str, fitting: Iterable[Expert | ExpertSet]) -> ChangeRefused:
    """`who` names an unknown object; proposes those that fit, `public` never: no list may name it.

    Only operators read this, so hidden experts are named, too.
    """
    ids = sorted(str(document.id) for document in fitting if document.id != PUBLIC)
    if len(ids) > _MOST_NAMED:
        ids[_MOST_NAMED:] = [f"{len(ids) - _MOST_NAMED} more"]
    existing = f"use one of {', '.join(ids)}" if ids else "there is none yet"
    return ChangeRefused(f"{who} names the unknown {what} {name!r}: {existing}")


def _users(connection: Connection, reference: str) -> list[str]:
    """The documents that name an expert or a set, in words."""
    agreements = [f"agreement {a.id!r}" for a in read_all(connection, Agreement) if reference in a.experts]
    tenants = [f"project {t.id!r}" for t in read_all(connection, Tenant) if reference in _references(t)]
    sets = [f"set {s.id!r}" for s in read_all(connection, ExpertSet) if reference in s.experts]
    return agreements + tenants + sets
