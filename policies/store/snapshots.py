"""Read a snapshot from one consistent state of the database: whole, or what changed since another."""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, String, cast, or_, select

from flexgate.policies.agreements import Agreement
from flexgate.policies.documents import Expert, ExpertSet, KeyRecord, Tenant
from flexgate.policies.errors import SnapshotInvalid, StoreDamaged, StoreRolledBack
from flexgate.policies.incremental import D, Edit, revise
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.store.database import PUT_BACK
from flexgate.policies.store.documents import KINDS, from_json, read_all
from flexgate.policies.store.keys import key_from_row
from flexgate.policies.store.revisions import ObjectChange, current_version, made_at, read_changes
from flexgate.policies.store.schema import api_keys, policy_changes
from flexgate.policies.store.weights_log import revocation_epochs

MOST_SETS_FOLLOWED: Final = 100
"""More changed sets than these are a query that databases refuse: the whole is read instead."""


def read_snapshot(connection: Connection) -> Snapshot:
    """Everything the connection's transaction sees; raises `StoreDamaged`."""
    version = current_version(connection)
    try:
        return Snapshot.build(
            policy_version=version,
            made=made_at(connection, version),
            experts=read_all(connection, Expert),
            tenants=read_all(connection, Tenant),
            agreements=read_all(connection, Agreement),
            sets=read_all(connection, ExpertSet),
            keys=[key_from_row(row) for row in connection.execute(select(api_keys)).all()],
            revocation_epochs=revocation_epochs(connection),
        )
    except SnapshotInvalid as error:
        raise StoreDamaged(f"the stored policy is inconsistent ({error}): {PUT_BACK}") from error


def read_snapshot_after(connection: Connection, known: Snapshot) -> Snapshot:
    """`known` itself if nothing changed since, else the newest; equal to `read_snapshot`.

    Raises `StoreRolledBack` when `known` is not in the store's history, and `StoreDamaged`.
    """
    version = current_version(connection)
    require_in_history(connection, known.policy_version, known.made)
    if version == known.policy_version:
        return known
    changes = read_changes(connection, known.policy_version, version)
    sets = _edits(ExpertSet, changes)
    changed = {edit.id for edit in sets if edit.before is not None}
    if len(changed) > MOST_SETS_FOLLOWED:
        return read_snapshot(connection)
    try:
        return revise(
            known,
            policy_version=version,
            made=made_at(connection, version),
            experts=_edits(Expert, changes),
            sets=sets,
            tenants=[*_edits(Tenant, changes), *_naming(connection, Tenant, changed)],
            agreements=[*_edits(Agreement, changes), *_naming(connection, Agreement, changed)],
            keys=_keys_of(connection, known.policy_version),
            revocation_epochs=revocation_epochs(connection),
        )
    except SnapshotInvalid as error:
        raise StoreDamaged(f"the stored policy is inconsistent ({error}): {PUT_BACK}") from error


def require_in_history(connection: Connection, read_before: int, made: float) -> None:
    """Raise `StoreRolledBack` unless the store's history holds version `read_before`, made at that very moment."""
    version, advice = current_version(connection), "restore the newer database"
    if version < read_before:
        raise StoreRolledBack(
            f"the database went back to policy version {version}, after version {read_before} was served: {advice}"
        )
    if made_at(connection, read_before) != made:
        raise StoreRolledBack(
            f"the database has another policy version {read_before} than the one that was served before: {advice}"
        )


def _edits(kind: type[D], changes: list[ObjectChange]) -> list[Edit[D]]:
    name = KINDS[kind][0]
    return [
        Edit(
            change.object_id,
            None if change.before is None else from_json(kind, change.before),
            None if change.after is None else from_json(kind, change.after),
        )
        for change in changes
        if change.kind == name
    ]


def _naming(connection: Connection, kind: type[D], sets: set[str]) -> list[Edit[D]]:
    """Documents that name one of these sets, to be compiled again."""
    if not sets:
        return []
    table = KINDS[kind][1]
    names = or_(*(cast(table.c.document, String).contains(f'"{name}"', autoescape=True) for name in sorted(sets)))
    rows = connection.execute(select(table.c.document).where(names))
    documents = [from_json(kind, row.document) for row in rows]
    return [Edit(document.id, document, document) for document in documents]


def _keys_of(connection: Connection, after: int) -> list[KeyRecord]:
    """The keys that revisions later than `after` made or revoked."""
    changes = policy_changes
    ids = select(changes.c.object_id).where(changes.c.version > after, changes.c.kind == "api_key")
    return [key_from_row(row) for row in connection.execute(select(api_keys).where(api_keys.c.id.in_(ids)))]
