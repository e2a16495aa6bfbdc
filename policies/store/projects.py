"""What an administrator does with projects (tenants): create, change, archive."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any, NamedTuple

from pydantic import ValidationError

from flexgate.policies.agreements import STORED
from flexgate.policies.documents import Quota, Tenant
from flexgate.policies.errors import ChangeRefused, ObjectUnknown
from flexgate.policies.store.change import Change
from flexgate.policies.store.database import reading
from flexgate.policies.store.documents import changed, checked, first_mistake, read_all, read_one
from flexgate.policies.store.revisions import read_object
from flexgate.policies.store.schema import api_keys
from flexgate.policies.store.store import Store


class Times(NamedTuple):
    """Unix seconds of a project's life."""

    created: float
    archived: float | None


def create_project(store: Store, name: str, *, actor: str, at: float, fields: dict[str, Any] | None = None) -> Tenant:
    """A new project: allow_list with nothing on it unless `fields` say more, so it gets `public`."""
    values = {"id": f"proj_{secrets.token_hex(12)}", "name": name, **(fields or {})}
    with store.change(actor=actor, note="create project", at=at) as change:
        tenant = checked(Tenant, values)
        change.put(tenant)
    return tenant


def get_project(store: Store, project_id: str) -> Tenant:
    """One project, archived or not; raises `ObjectUnknown`."""
    with reading(store.engine) as connection:
        tenant = read_one(connection, Tenant, project_id)
    if tenant is None:
        raise _unknown(project_id)
    return tenant


def list_projects(store: Store, *, archived: bool = False) -> list[Tenant]:
    """Projects in the order of their creation; archived ones only if asked for."""
    with reading(store.engine) as connection:
        tenants = read_all(connection, Tenant)
    return [tenant for tenant in tenants if archived or not tenant.archived]


def project_times(store: Store, project_ids: Iterable[str]) -> dict[str, Times]:
    """When each project was created, and archived if it was (Unix seconds)."""
    with reading(store.engine) as connection:
        changes = read_object(connection, "tenant", project_ids)
    times: dict[str, Times] = {}
    for at, change in changes:
        known = times.get(change.object_id, Times(at, None))
        archived = bool(change.after and change.after["archived"])
        times[change.object_id] = Times(known.created, (known.archived or at) if archived else None)
    return times


def update_project(
    store: Store,
    project_id: str,
    fields: dict[str, Any],
    *,
    actor: str,
    at: float,
    before: dict[str, Any] | None = None,
) -> Tenant:
    """Change some fields of a project (`name`, `mode`, `expert_ids`, `purposes`, …).

    `{"mode": …, "expert_ids": […]}` is what `expert_permissions` sets. Raises `ObjectUnknown`, or
    `ChangeRefused` for a field or value that a tenant cannot have, for archived projects, and where a field of
    `before` has another value now.
    """
    if {"id", "archived"} & fields.keys():
        raise ChangeRefused("a project's id stays, and archiving is an action of its own")
    with store.change(actor=actor, note="update project", at=at, urgent=True) as change:
        known = active_project(change, project_id)
        if before is not None and changed(known, before) != known:
            raise ChangeRefused(f"project {project_id!r} was changed meanwhile: read it again, and repeat the change")
        tenant = changed(known, fields)
        change.put(tenant)
    return tenant


def set_quota(
    store: Store, project_id: str, fields: dict[str, Any], *, key_id: str | None = None, actor: str, at: float
) -> Quota:
    """Change some limits of a project, or of one of its keys; raises `ObjectUnknown`, `ChangeRefused`."""
    with store.change(actor=actor, note="set limits", at=at) as change:
        tenant = active_project(change, project_id)
        before = tenant.quota if key_id is None else tenant.key_quotas.get(key_id, Quota())
        quota = _quota(before, fields)
        if key_id is None:
            change.put(tenant.model_copy(update={"quota": quota}))
            return quota
        if not change.keys(api_keys.c.id == key_id, api_keys.c.tenant_id == project_id):
            raise ObjectUnknown(f"there is no key {key_id!r} in this project")
        change.put(tenant.model_copy(update={"key_quotas": {**tenant.key_quotas, key_id: quota}}))
    return quota


def _quota(before: Quota, fields: dict[str, Any]) -> Quota:
    try:
        Quota.model_validate(fields)  # words of what is new are checked, those of what is stored are not
        return Quota.model_validate({**before.model_dump(), **fields}, context=STORED)
    except ValidationError as error:
        raise ChangeRefused(first_mistake(error, "the limits")) from None


def archive_project(store: Store, project_id: str, *, actor: str, at: float) -> Tenant:
    """Archive a project for good and revoke its keys. Doing it again changes nothing."""
    with store.change(actor=actor, note="archive project", at=at, urgent=True) as change:
        tenant = change.get(Tenant, project_id)
        if tenant is None:
            raise _unknown(project_id)
        tenant = tenant.model_copy(update={"archived": True})
        change.put(tenant)
        for key in change.keys(api_keys.c.tenant_id == project_id):
            change.revoke_key(key.key_id)
    return tenant


def active_project(change: Change, project_id: str) -> Tenant:
    """The project inside a change; raises `ObjectUnknown`, or `ChangeRefused` once archived."""
    tenant = change.get(Tenant, project_id)
    if tenant is None:
        raise _unknown(project_id)
    if tenant.archived:
        raise ChangeRefused(f"project {project_id!r} is archived: create another one")
    return tenant


def _unknown(project_id: str) -> ObjectUnknown:
    return ObjectUnknown(f"there is no project {project_id!r}")
