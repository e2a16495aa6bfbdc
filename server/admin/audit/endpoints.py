"""`/v1/organization/audit_logs`: every change of the policy, and denied requests until they are trimmed."""

from __future__ import annotations

from typing import Final

from flexgate.policies.audit import Entry
from flexgate.policies.documents import Role
from flexgate.policies.store.audit import Sought, search
from flexgate.server.admin.audit.schemas import (
    PREFIX,
    AuditLogPage,
    AuditTrimming,
    ListAuditLogs,
    TrimAuditLogs,
    audit_object,
    project_of,
    type_of,
)
from flexgate.server.admin.operation import Call, Nothing
from flexgate.server.admin.pages import unknown_cursor
from flexgate.server.admin.router import OperationRouter
from flexgate.server.policy.retention import trim_denials

router: Final = OperationRouter()


@router.operation("GET", "/v1/organization/audit_logs", roles=(Role.ADMIN, Role.AUDITOR))
def list_(call: Call[Nothing, ListAuditLogs]) -> AuditLogPage:
    """List entries of the audit log, newest first; with `before` alone the entries next to that one."""
    query = call.query
    back = query.before is not None and query.after is None
    found = search(call.store.engine, _sought(query), limit=query.limit + 1, oldest=back)
    chosen = [audit_object(entry) for entry in found[: query.limit]]
    return AuditLogPage.of(chosen[::-1] if back else chosen, more=len(found) > len(chosen))


@router.operation("POST", "/v1/organization/audit_logs/trim", roles=(Role.ADMIN,))
def trim(call: Call[TrimAuditLogs, Nothing]) -> AuditTrimming:
    """Delete old entries of denied requests. Changes are never deleted; the trim is recorded."""
    trimmed = trim_denials(call.store, days=call.body.older_than_days, now=call.now, actor=call.principal.key_id)
    return AuditTrimming(trimmed=trimmed)


def _sought(query: ListAuditLogs) -> Sought:
    range_ = query.effective_at
    since = [at for at in (range_.gte, None if range_.gt is None else range_.gt + 1) if at is not None]
    until = [at for at in (range_.lt, None if range_.lte is None else range_.lte + 1) if at is not None]
    return Sought(
        before=_sequence(query.after, "after"),
        after=_sequence(query.before, "before"),
        since=max(since, default=None),
        until=min(until, default=None),
        log=query.log,
        actors=None if query.actor_ids is None else frozenset(query.actor_ids),
        matches=lambda entry: _matches(query, entry),
    )


def _matches(query: ListAuditLogs, entry: Entry) -> bool:
    return (
        (query.event_types is None or type_of(entry) in query.event_types)
        and (query.project_ids is None or project_of(entry) in query.project_ids)
        and (query.resource_ids is None or entry.detail.get("id") in query.resource_ids)
    )


def _sequence(cursor: str | None, param: str) -> int | None:
    if cursor is None:
        return None
    number = cursor.removeprefix(PREFIX)
    if number == cursor or not number.isascii() or not number.isdigit() or len(number) > 15:
        raise unknown_cursor(param)
    return int(number)
