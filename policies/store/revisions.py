"""Revisions: numbered, attributed, appended in the transaction that makes the change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flexgate.policies.store.schema import policy_changes, policy_revisions
from sqlalchemy import Connection, func, insert, select


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
    at: float
    actor: str
    note: str


def current_version(connection: Connection) -> int:
    """The newest policy version; 0 before the first change."""
    newest: int | None = connection.scalar(select(func.max(policy_revisions.c.version)))
    return newest or 0


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
