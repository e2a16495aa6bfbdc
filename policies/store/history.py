"""The history of the policy: list revisions, read what one changed, compare two, go back to one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Final

from sqlalchemy import Connection

from flexgate.policies.agreements import Agreement
from flexgate.policies.documents import Expert, ExpertSet, Tenant
from flexgate.policies.errors import ChangeRefused, ConfirmationRequired
from flexgate.policies.store.change import Change
from flexgate.policies.store.database import reading
from flexgate.policies.store.documents import KINDS, D, from_json, read_all, to_json
from flexgate.policies.store.revisions import (
    ObjectChange,
    Revision,
    current_version,
    read_changes,
    read_newest,
)
from flexgate.policies.store.store import Store

_MOST_NAMED: Final = 10
_BEFORE_USERS: Final = (Expert, ExpertSet, Tenant, Agreement)


def newest_revisions(store: Store, *, before: int | None = None, limit: int = 100) -> list[Revision]:
    """Revisions older than `before`, newest first, at most `limit`."""
    with reading(store.engine) as connection:
        return read_newest(connection, before, limit)


def diff(store: Store, old: int, new: int) -> list[ObjectChange]:
    """What differs between two policy versions: one entry per object, from `old` to `new`.

    `old` may be the later one. Raises `ChangeRefused` for a version that never was.
    """
    with reading(store.engine) as connection:
        _check_versions(connection, old, new)
        return _net(connection, old, new)


def changes_back(connection: Connection, version: int) -> list[ObjectChange]:
    """What leads from the present back to a version; raises `ChangeRefused` for one that never was."""
    _check_versions(connection, version)
    return _net(connection, current_version(connection), version)


def documents_after(connection: Connection, changes: list[ObjectChange], kind: type[D]) -> list[D]:
    """The present documents of a kind, as changes leave them."""
    documents = {str(to_json(document)["id"]): document for document in read_all(connection, kind)}
    for entry in _of(kind, changes):
        if entry.after is None:
            del documents[entry.object_id]
        else:
            documents[entry.object_id] = from_json(kind, entry.after)
    return list(documents.values())


def roll_back(store: Store, to: int, *, confirm: int | None, actor: str, at: float) -> int:
    """Restore the policy of version `to` as a new revision; returns its version.

    What cannot be undone stays: keys (a revoked key stays revoked), the catalogue (it follows the
    checkpoint; only what is hidden or required goes back), that a tenant existed (it is archived), and that
    one was archived. An agreement that comes back gets a new, higher version.

    Args:
        confirm: the present version, which confirms the rollback.

    Raises:
        ConfirmationRequired: something would change, and `confirm` is not the present version; says what.
        ChangeRefused: there never was version `to`, or its documents are refused today.
    """
    with store.change(actor=actor, note=f"roll back to {to}", at=at, urgent=True) as change:
        present = change.policy_version
        changes = diff(store, change.policy_version, to)
        for kind in _BEFORE_USERS:
            for entry in _of(kind, changes):
                if entry.after is not None:
                    change.put(_restored(change, entry), restored=True)
        for kind in reversed(_BEFORE_USERS):
            for entry in _of(kind, changes):
                if entry.after is None:
                    _undo_creation(change, kind, entry)
        change.settle(restored=True)
        if change.changes and confirm != present:
            raise ConfirmationRequired(
                f"rolling back from policy version {present} to {to} would {_in_words(change.changes)}: nothing was "
                f"changed; to do it, set 'confirm' to {present}, the current version"
            )
    return change.policy_version


def _in_words(changes: list[ObjectChange]) -> str:
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for change in changes:
        found[_verb(change), change.kind.replace("_", " ")].append(repr(change.object_id))
    return ", ".join(f"{verb} {_counted(len(ids), kind)} ({_some(ids)})" for (verb, kind), ids in found.items())


def _counted(number: int, kind: str) -> str:
    return f"{number} {kind}" if number == 1 else f"{number} {kind}s"


def _verb(change: ObjectChange) -> str:
    before, after = change.before, change.after
    if before is None:
        return "bring back"
    if after is None:
        return "remove"
    return "archive" if after.get("archived") and not before.get("archived") else "change"


def _some(ids: list[str]) -> str:
    more = [f"{len(ids) - _MOST_NAMED} more"] if len(ids) > _MOST_NAMED else []
    return ", ".join([*ids[:_MOST_NAMED], *more])


def _restored(change: Change, entry: ObjectChange) -> Expert | ExpertSet | Tenant | Agreement:
    match entry.kind:
        case "expert":
            then, now = from_json(Expert, entry.after), change.get(Expert, entry.object_id)
            if now is None:
                return then
            return now.model_copy(update={"visibility": then.visibility, "required": then.required})
        case "expert_set":
            return from_json(ExpertSet, entry.after)
        case "tenant":
            tenant, present = from_json(Tenant, entry.after), change.get(Tenant, entry.object_id)
            archived = tenant.archived or (present is not None and present.archived)
            return tenant.model_copy(update={"archived": archived})
        case _:
            version = change.next_agreement_version(entry.object_id)
            return from_json(Agreement, entry.after).model_copy(update={"version": version})


def _undo_creation(change: Change, kind: type[D], entry: ObjectChange) -> None:
    if kind is Tenant:
        created = from_json(Tenant, entry.before)
        change.put(created.model_copy(update={"archived": True}), restored=True)
    elif kind is not Expert:
        change.remove(kind, entry.object_id)


def _of(kind: type[D], changes: Iterable[ObjectChange]) -> list[ObjectChange]:
    return [entry for entry in changes if entry.kind == KINDS[kind][0]]


def _net(connection: Connection, old: int, new: int) -> list[ObjectChange]:
    steps = read_changes(connection, min(old, new), max(old, new))
    ends: dict[tuple[str, str], tuple[dict[str, Any] | None, dict[str, Any] | None]] = {}
    for step in steps:
        key = (step.kind, step.object_id)
        first = ends[key][0] if key in ends else step.before
        ends[key] = (first, step.after)
    if old > new:
        ends = {key: (after, before) for key, (before, after) in ends.items()}
    return [
        ObjectChange(kind, id_, before, after)
        for (kind, id_), (before, after) in sorted(ends.items(), key=lambda item: item[0])
        if before != after
    ]


def _check_versions(connection: Connection, *versions: int) -> None:
    newest = current_version(connection)
    for version in versions:
        if not 0 <= version <= newest:
            raise ChangeRefused(f"there is no policy version {version}: the newest is {newest}")
