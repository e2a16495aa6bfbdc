"""Entries of the audit log as OpenAI's clients know them; the hash chain is under `flexgate`."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field

from flexgate.policies.audit import Entry
from flexgate.server.admin.pages import Identified, PageOf
from flexgate.server.http.schemas import Shown, is_none
from flexgate.server.http.validation import Closed

PREFIX: Final = "audit_log-"
_KINDS: Final = {"tenant": "project"}


Seconds = Annotated[int, Field(ge=0, le=10**12)] | None


class Range(Closed):
    """Whole Unix seconds."""

    gt: Seconds = None
    gte: Seconds = None
    lt: Seconds = None
    lte: Seconds = None


class ListAuditLogs(Closed):
    """OpenAI's parameters, and `log` for one of the two logs. There are no e-mail addresses here, and every event is
    the tenant's.
    """

    after: str | None = None
    before: str | None = None
    limit: int = Field(20, ge=1, le=100)
    effective_at: Range = Range()
    event_types: list[str] | None = None
    actor_ids: list[str] | None = None
    project_ids: list[str] | None = None
    resource_ids: list[str] | None = None
    log: Literal["changes", "requests"] | None = None


class TrimAuditLogs(Closed):
    """The age from which denied requests are deleted."""

    older_than_days: int = Field(ge=1, le=36_500)


class AuditKey(Identified):
    """The key that did it."""

    type: Literal["service_account"] = "service_account"


class AuditActor(Shown):
    """Who did it."""

    type: Literal["api_key"] = "api_key"
    api_key: AuditKey


class AuditEvent(Shown):
    """What it was done to, and how that is since."""

    id: str | None
    data: dict[str, Any] | None


class AuditProject(Identified):
    """The project that an entry is about."""


class AuditChain(Shown):
    """An entry as it is in the log: its place in the chain of hashes, and all that it says."""

    sequence: int
    at: float
    action: str
    detail: dict[str, Any]
    previous: str
    hash: str
    log: Literal["changes", "requests"]


class AuditLogObject(Identified):
    """One entry. The event's own field has its type for a name, as in OpenAI's API."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, AuditEvent] = Field(init=False)

    object: Literal["organization.audit_log"] = "organization.audit_log"
    type: str
    effective_at: int
    actor: AuditActor
    project: Annotated[AuditProject | None, Field(exclude_if=is_none)] = None
    flexgate: AuditChain


class AuditLogPage(PageOf[AuditLogObject]):
    """A part of the audit log, newest first."""


class AuditTrimming(Shown):
    """How many entries were removed."""

    object: Literal["organization.audit_log.trimming"] = "organization.audit_log.trimming"
    trimmed: int


def type_of(entry: Entry) -> str:
    """OpenAI's word for what happened, where it has one."""
    kind, _, verb = entry.action.partition(".")
    before, after = entry.detail.get("before"), entry.detail.get("after")
    if kind == "tenant" and verb == "updated" and after and before:
        verb = "archived" if after["archived"] and not before["archived"] else verb
    if kind == "api_key" and verb == "updated":
        verb = "deleted"
    return f"{_KINDS.get(kind, kind)}.{verb}"


def project_of(entry: Entry) -> str | None:
    """The project that an entry is about."""
    detail = entry.detail
    if entry.action.startswith("tenant."):
        return str(detail["id"])
    document = detail.get("after") or detail.get("before") or detail
    found = document.get("tenant_id")
    return None if found is None else str(found)


def audit_object(entry: Entry) -> AuditLogObject:
    """One entry."""
    type_, project = type_of(entry), project_of(entry)
    event = AuditEvent(id=entry.detail.get("id"), data=entry.detail.get("after"))
    return AuditLogObject.model_validate(
        {
            "id": f"{PREFIX}{entry.sequence}",
            "type": type_,
            "effective_at": int(entry.at),
            "actor": AuditActor(api_key=AuditKey(id=entry.actor)),
            "project": None if project is None else AuditProject(id=project),
            type_: event,
            "flexgate": AuditChain.model_validate({name: getattr(entry, name) for name in AuditChain.model_fields}),
        }
    )
