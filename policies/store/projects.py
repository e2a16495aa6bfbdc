"""What an administrator does with projects (tenants): create, change, permit experts, archive."""

from __future__ import annotations

import secrets
from typing import Any

from pydantic import ValidationError

from flexgate.policies.errors import ChangeRefused, ObjectUnknown
from flexgate.policies.store.change import Change
from flexgate.policies.store.documents import read_all
from flexgate.policies.store.engine import reading
from flexgate.policies.store.store import Store
from flexgate.policies.tenants import Tenant


def create_project(store: Store, name: str, *, actor: str, at: float) -> Tenant:
    """A new project: allow_list with nothing on it, so it gets `public`."""
    values = {"id": f"proj_{secrets.token_hex(12)}", "name": name}
    with store.change(actor=actor, note="create project", at=at) as change:
        tenant = _validated(values)
        change.put(tenant)
    return tenant


def get_project(store: Store, project_id: str) -> Tenant:
    """One project, archived or not; raises `ObjectUnknown`."""
    for tenant in list_projects(store, archived=True):
        if tenant.id == project_id:
            return tenant
    raise _unknown(project_id)


def list_projects(store: Store, *, archived: bool = False) -> list[Tenant]:
    """Projects in the order of their creation; archived ones only if asked for."""
    with reading(store.engine) as connection:
        tenants = read_all(connection, Tenant)
    return [tenant for tenant in tenants if archived or not tenant.archived]


def update_project(store: Store, project_id: str, fields: dict[str, Any], *, actor: str, at: float) -> Tenant:
    """Change some fields of a project (`name`, `mode`, `expert_ids`, `purposes`, …).

    `{"mode": …, "expert_ids": […]}` is what `expert_permissions` sets. Raises `ObjectUnknown`, or
    `ChangeRefused` for a field or value that a tenant cannot have, and for archived projects.
    """
    if {"id", "archived"} & fields.keys():
        raise ChangeRefused("a project's id stays, and archiving is an action of its own")
    with store.change(actor=actor, note="update project", at=at) as change:
        tenant = _validated({**active_project(change, project_id).model_dump(), **fields})
        change.put(tenant)
    return tenant


def archive_project(store: Store, project_id: str, *, actor: str, at: float) -> Tenant:
    """Archive a project for good and revoke its keys. Doing it again changes nothing."""
    with store.change(actor=actor, note="archive project", at=at) as change:
        tenant = change.get(Tenant, project_id)
        if tenant is None:
            raise _unknown(project_id)
        tenant = tenant.model_copy(update={"archived": True})
        change.put(tenant)
        for key in change.keys():
            if key.tenant_id == project_id:
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


def _validated(values: dict[str, Any]) -> Tenant:
    try:
        return Tenant.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ChangeRefused(f"{where}: {first['msg']}") from None


def _unknown(project_id: str) -> ObjectUnknown:
    return ObjectUnknown(f"there is no project {project_id!r}")
