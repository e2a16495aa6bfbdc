"""Revisions: numbered, attributed, appended in the transaction that makes the change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import Field, TypeAdapter, ValidationError
from sqlalchemy import Connection, Row, func, insert, select

from flexgate.policies.agreements import Agreement
from flexgate.policies.store.documents import damaged, from_json
from flexgate.policies.store.schema import policy_changes, policy_revisions

LAST_SECOND: Final = 253402300799.0
"""Of the year 9999: no later moment can be written as a date."""


@dataclass(frozen=True, slots=True)
class ObjectChange:
    """One object before and after a revision; None where it did not exist."""

    kind: str
    object_id: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Revision:
    """Who changed the policy, when (Unix seconds) and why."""

    version: int
    at: Annotated[float, Field(ge=0, le=LAST_SECOND, strict=True)]
    actor: str
    note: str


_REVISION: Final = TypeAdapter(Revision)


def current_version(connection: Connection) -> int:
    """The newest policy version; 0 before the first change."""
    newest: int | None = connection.scalar(select(func.max(policy_revisions.c.version)))
    return newest or 0


def made_at(connection: Connection, version: int) -> float:
    """When a version was made (Unix seconds); 0.0 if it never was."""
    row = connection.execute(select(policy_revisions).where(policy_revisions.c.version == version)).one_or_none()
    return 0.0 if row is None else _revision(row).at


def read_changes(connection: Connection, after: int, until: int) -> list[ObjectChange]:
    """What the revisions `after < version <= until` changed, in order."""
    table = policy_changes
    query = (
        select(table.c.kind, table.c.object_id, table.c.before, table.c.after)
        .where(table.c.version > after, table.c.version <= until)
        .order_by(table.c.version, table.c.ordinal)
    )
    return [ObjectChange(**row._mapping) for row in connection.execute(query)]


def read_newest(connection: Connection, before: int | None, limit: int) -> list[Revision]:
    """Revisions older than `before` (all of them if that is None), newest first."""
    table = policy_revisions
    query = select(table).order_by(table.c.version.desc()).limit(limit)
    if before is not None:
        query = query.where(table.c.version < before)
    return [_revision(row) for row in connection.execute(query)]


def _revision(row: Row[Any]) -> Revision:
    try:
        return _REVISION.validate_python(dict(row._mapping))
    except ValidationError as error:
        raise damaged("revision", {"id": row.version}, error) from error


def read_object(connection: Connection, kind: str, ids: Iterable[str]) -> list[tuple[float, ObjectChange]]:
    """Every change of some objects, in order, each with the time of its revision."""
    table, revisions = policy_changes, policy_revisions
    columns = (table.c.kind, table.c.object_id, table.c.before, table.c.after)
    query = (
        select(revisions.c.at, *columns)
        .join(revisions, revisions.c.version == table.c.version)
        .where(table.c.kind == kind, table.c.object_id.in_(list(ids)))
        .order_by(table.c.version, table.c.ordinal)
    )
    return [(row[0], ObjectChange(*row[1:])) for row in connection.execute(query)]


def read_between(connection: Connection, kind: str, since: float, until: float) -> list[tuple[float, ObjectChange]]:
    """Changes of one kind by revisions of a time, in order, each with the time of its revision (Unix seconds)."""
    table, revisions = policy_changes, policy_revisions
    query = (
        select(revisions.c.at, table.c.kind, table.c.object_id, table.c.before, table.c.after)
        .join(revisions, revisions.c.version == table.c.version)
        .where(table.c.kind == kind, revisions.c.at >= since, revisions.c.at < until)
        .order_by(table.c.version, table.c.ordinal)
    )
    return [(row[0], ObjectChange(*row[1:])) for row in connection.execute(query)]


def agreement_versions(connection: Connection, id_: str) -> list[Agreement]:
    """Every version of an agreement that was ever stored; terminated ones too."""
    table = policy_changes
    query = select(table.c.after).where(table.c.kind == "agreement", table.c.object_id == id_)
    stored = [row.after for row in connection.execute(query)]
    return [from_json(Agreement, values) for values in stored if values is not None]


def append(connection: Connection, revision: Revision, changes: list[ObjectChange]) -> None:
    """Write one revision with its changes."""
    connection.execute(
        insert(policy_revisions).values(
            version=revision.version, at=revision.at, actor=revision.actor, note=revision.note
        )
    )
    connection.execute(
        insert(policy_changes),
        [
            {
                "version": revision.version,
                "ordinal": ordinal,
                "kind": change.kind,
                "object_id": change.object_id,
                "before": change.before,
                "after": change.after,
            }
            for ordinal, change in enumerate(changes)
        ],
    )
