"""What owners and administrators do with agreements.

`owner_id` of None is an administrator. An owner sees and changes its own agreements; another
owner's is as unknown as one that does not exist.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from flexgate.policies.agreements import Agreement
from flexgate.policies.documents import Expert, ExpertSet
from flexgate.policies.errors import ChangeRefused, ObjectUnknown
from flexgate.policies.store.change import Change
from flexgate.policies.store.database import reading
from flexgate.policies.store.documents import checked, from_json, read_all, read_one
from flexgate.policies.store.prices import check_price
from flexgate.policies.store.revisions import read_between, read_object
from flexgate.policies.store.store import Store

MOST_OF_OWNER: Final = 10_000
"""Agreements that an owner makes itself: all processes hold them, and lists are made of all."""
MOST_WITH_ONE: Final = 1_000
"""Of these, with one assignee: a decision reads all that are about an expert."""
_NOT_AN_OWNERS: Final = (
    "what projects' requests must use is said by administrators: an owner can only permit and prohibit its experts"
)

IDS_AT_ONCE: Final = 500
"""In one query."""


def list_agreements(store: Store, *, owner_id: str | None = None) -> list[Agreement]:
    """The agreements in the order in which they were first made."""
    with reading(store.engine) as connection:
        agreements = read_all(connection, Agreement)
    return [a for a in agreements if owner_id is None or a.owner == owner_id]


def get_agreement(store: Store, agreement_id: str, *, owner_id: str | None = None) -> Agreement:
    """One agreement; raises `ObjectUnknown`."""
    with reading(store.engine) as connection:
        agreement = read_one(connection, Agreement, agreement_id)
    if agreement is None or owner_id not in (None, agreement.owner):
        raise _unknown(agreement_id)
    return agreement


def read_versions(store: Store, names: Collection[tuple[str, int]]) -> dict[tuple[str, int], Agreement]:
    """Versions of agreements by id and version, in force or not; one that never was is left out."""
    sought: dict[str, set[int]] = {}
    for id_, version in names:
        sought.setdefault(id_, set()).add(version)
    found, ids = {}, sorted(sought)
    with reading(store.engine) as connection:
        for start in range(0, len(ids), IDS_AT_ONCE):
            for _, change in read_object(connection, "agreement", ids[start : start + IDS_AT_ONCE]):
                values = change.after
                if values is not None and values["version"] in sought[change.object_id]:
                    found[change.object_id, values["version"]] = from_json(Agreement, values)
    return found


@dataclass(frozen=True, slots=True)
class AgreementChange:
    """An agreement before and after a change, None where there was or is none; `at` is Unix seconds."""

    at: float
    before: Agreement | None
    after: Agreement | None


def changes_between(store: Store, owner_id: str, since: float, until: float) -> list[AgreementChange]:
    """How an owner's agreements changed in a time, in order."""

    def parsed(values: dict[str, Any] | None) -> Agreement | None:
        return None if values is None else from_json(Agreement, values)

    with reading(store.engine) as connection:
        found = read_between(connection, "agreement", since, until)
    return [
        AgreementChange(at, parsed(change.before), parsed(change.after))
        for at, change in found
        if owner_id in [values["owner"] for values in (change.before, change.after) if values is not None]
    ]


def create_agreement(
    store: Store, fields: dict[str, Any], *, actor: str, at: float, owner_id: str | None = None
) -> Agreement:
    """A new agreement with `fields`. Without an id it gets one; an owner's always does, because a
    refused id would tell one owner of another's.
    """
    if owner_id is not None and "id" in fields:
        raise ChangeRefused("an owner's agreements get their ids from the server: leave 'id' out")
    id_ = fields.get("id") or f"agr_{secrets.token_hex(8)}"
    restricts = fields.get("effect") != "permit"
    with store.change(actor=actor, note="create agreement", at=at, urgent=restricts) as change:
        if change.get(Agreement, id_) is not None:
            raise ChangeRefused(f"the id {id_!r} is taken: choose another one")
        owner = fields.get("owner", owner_id)
        return _put_next(change, {**fields, "id": id_, "owner": owner}, owner_id)


def revise_agreement(
    store: Store,
    agreement_id: str,
    fields: dict[str, Any],
    *,
    actor: str,
    at: float,
    owner_id: str | None = None,
) -> Agreement:
    """Replace an agreement under the next version. `fields` may say which version that must be."""
    with store.change(actor=actor, note="revise agreement", at=at, urgent=True) as change:
        before = _own(change, agreement_id, owner_id)
        if fields.get("id", agreement_id) != agreement_id or fields.get("owner", before.owner) != before.owner:
            raise ChangeRefused(
                "'id' and 'owner' of an agreement cannot be changed: leave them out, or create another agreement"
            )
        same = {**fields, "id": agreement_id, "owner": before.owner}
        if checked(Agreement, {**same, "version": before.version}) == before:
            return before
        return _put_next(change, same, owner_id)


def put_agreement(store: Store, agreement: Agreement, *, actor: str, at: float, owner_id: str | None = None) -> int:
    """Store an agreement under the version that it says; returns the policy version."""
    with store.change(actor=actor, note="put agreement", at=at) as change:
        before = change.get(Agreement, agreement.id)
        if before is not None and before.owner != agreement.owner:
            raise ChangeRefused(f"the id {agreement.id!r} is taken: choose another one")
        _put(change, agreement, owner_id)
    return change.policy_version


def terminate_agreement(store: Store, agreement_id: str, *, actor: str, at: float, owner_id: str | None = None) -> int:
    """Terminate an agreement now; returns the policy version. An owner may always do this."""
    with store.change(actor=actor, note="terminate agreement", at=at, urgent=True) as change:
        _own(change, agreement_id, owner_id)
        change.remove(Agreement, agreement_id)
    return change.policy_version


def _put_next(change: Change, fields: dict[str, Any], owner_id: str | None) -> Agreement:
    version = change.next_agreement_version(fields["id"])
    if fields.get("version", version) != version:
        raise ChangeRefused(f"agreement {fields['id']!r} would get version {version}, not {fields['version']}")
    agreement = checked(Agreement, {**fields, "version": version})
    _put(change, agreement, owner_id)
    return agreement


def _put(change: Change, agreement: Agreement, owner_id: str | None) -> None:
    if owner_id is not None:
        _check_own(change, agreement, owner_id)
    change.put(agreement)


def _check_own(change: Change, agreement: Agreement, owner_id: str) -> None:
    """Refuse what is not the owner's. Others' experts are refused like names that do not exist."""
    if agreement.owner != owner_id:
        raise ChangeRefused("an owner makes agreements in its own name only")
    before = change.get(Agreement, agreement.id)
    if agreement.effect == "require" or (before is not None and before.effect == "require"):
        raise ChangeRefused(_NOT_AN_OWNERS)
    if before is None or before.assignee != agreement.assignee:
        _check_number(change, owner_id, agreement.assignee)
    own = {expert.id for expert in change.all(Expert) if expert.owner == owner_id}
    sets = {s.id for s in change.all(ExpertSet) if s.experts <= own}
    for reference in sorted(agreement.experts):
        if reference not in own and reference not in sets:
            raise ChangeRefused(f"{reference!r} is neither an expert of {owner_id!r} nor a set of its experts")
    check_price(change, agreement, before)


def _check_number(change: Change, owner_id: str, assignee: str) -> None:
    """Refuse one more agreement with an assignee, whose name an owner does not know."""
    found = change.agreements_by_assignee(owner_id)
    for number, most, which in (
        (found.get(assignee, 0), MOST_WITH_ONE, " with this assignee"),
        (sum(found.values()), MOST_OF_OWNER, ""),
    ):
        if number >= most:
            raise ChangeRefused(
                f"an owner may have {most} agreements{which}, and {owner_id!r} has {number}: revise or terminate one"
            )


def _own(change: Change, agreement_id: str, owner_id: str | None) -> Agreement:
    agreement = change.get(Agreement, agreement_id)
    if agreement is None or owner_id not in (None, agreement.owner):
        raise _unknown(agreement_id)
    if owner_id is not None and agreement.effect == "require":
        raise ChangeRefused(_NOT_AN_OWNERS)
    return agreement


def _unknown(agreement_id: str) -> ObjectUnknown:
    return ObjectUnknown(f"there is no agreement {agreement_id!r}")
