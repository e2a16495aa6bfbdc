"""`/v1/organization/projects`: tenants, and which experts each may use.

A project's own key may read the project, its expert permissions and its limits; another project is
to it as one that does not exist.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from flexgate.policies.documents import Role, Tenant
from flexgate.policies.store import projects
from flexgate.policies.store.projects import Times
from flexgate.policies.withhold import Withholding, listing_only, without_tenant
from flexgate.server.admin.operation import Call, Json, Nothing, Operation, Written
from flexgate.server.admin.pages import list_object, page_of
from flexgate.server.admin.projects.schemas import (
    CreateProject,
    ExpertPermissions,
    ListProjects,
    UpdateProject,
    listed,
    permissions_object,
    project_object,
)
from flexgate.server.http.refusals import not_found

OPERATORS: Final = (Role.ADMIN, Role.AUDITOR)
READERS: Final = (Role.ADMIN, Role.AUDITOR, Role.TENANT)


def visible_project(call: Call[Any, Any]) -> Tenant:
    """The project in the path; raises `NotFound` for absent and another tenant's alike."""
    project_id = call.path["project_id"]
    if call.principal.tenant_id not in (None, project_id):
        raise not_found()
    return projects.get_project(call.store, project_id)


def create(call: Call[CreateProject, Written]) -> Json:
    """Create a project. It may use `public` alone until permissions and agreements say more."""
    fields = call.body.flexgate.model_dump(exclude_unset=True)
    tenant = projects.create_project(call.store, call.body.name, fields=fields, **call.attributed)
    return project_object(tenant, Times(call.now, None), operator=True)


def list_(call: Call[Nothing, ListProjects]) -> Json:
    """List projects, oldest first."""
    tenants = projects.list_projects(call.store, archived=call.query.include_archived)
    chosen, more = page_of(tenants, call.query, lambda tenant: tenant.id)
    times = projects.project_times(call.store, [tenant.id for tenant in chosen])
    return list_object([project_object(t, times[t.id], operator=True) for t in chosen], more)


def retrieve(call: Call[Nothing, Nothing]) -> Json:
    """Show one project."""
    return _shown(call, visible_project(call))


def update(call: Call[UpdateProject, Written]) -> Json:
    """Change a project's name or what only flexgate has."""
    project_id = call.path["project_id"]
    return _shown(call, projects.update_project(call.store, project_id, call.body.fields(), **call.attributed))


def archive(call: Call[Nothing, Written]) -> Json:
    """Archive a project for good, and revoke its keys."""
    return _shown(call, projects.archive_project(call.store, call.path["project_id"], **call.attributed))


def show_permissions(call: Call[Nothing, Nothing]) -> Json:
    """Show which experts a project's list allows or denies."""
    tenant = visible_project(call)
    ids = list(tenant.expert_ids)
    if call.principal.tenant_id is not None:
        ids = listed(ids, call.snapshot, call.snapshot.tenants[tenant.id])
    return permissions_object(tenant.mode, ids)


def set_permissions(call: Call[ExpertPermissions, Written]) -> Json:
    """Set which experts a project's list allows or denies. Agreements must permit them, too."""
    return _permit(call, call.body.mode, call.body.expert_ids)


def reset_permissions(call: Call[Nothing, Written]) -> Json:
    """Go back to an empty allow list."""
    _permit(call, "allow_list", frozenset())
    return {"object": "project.expert_permissions.deleted", "deleted": True}


def _permit(call: Call[Any, Written], mode: str, expert_ids: frozenset[str]) -> Json:
    fields = {"mode": mode, "expert_ids": expert_ids}
    tenant = projects.update_project(call.store, call.path["project_id"], fields, **call.attributed)
    return permissions_object(tenant.mode, tenant.expert_ids)


def _archived(call: Call[Any, Any]) -> Withholding:
    return partial(without_tenant, tenant_id=call.path["project_id"])


def _unpermitted(call: Call[ExpertPermissions, Written]) -> Withholding:
    body = call.body
    return partial(
        listing_only, tenant_id=call.path["project_id"], mode=body.mode, expert_ids=frozenset(body.expert_ids)
    )


def _unpermitted_all(call: Call[Any, Any]) -> Withholding:
    return partial(listing_only, tenant_id=call.path["project_id"], mode="allow_list", expert_ids=frozenset())


def _shown(call: Call[Any, Any], tenant: Tenant) -> Json:
    times = projects.project_times(call.store, [tenant.id])[tenant.id]
    if call.principal.tenant_id is not None and tenant.default_experts is not None:
        default_experts = listed(tenant.default_experts, call.snapshot, call.snapshot.tenants[tenant.id])
        tenant = tenant.model_copy(update={"default_experts": frozenset(default_experts)})
    return project_object(tenant, times, operator=call.principal.role in OPERATORS)


_ALL: Final = "/v1/organization/projects"
_ONE: Final = f"{_ALL}/{{project_id}}"
_PERMISSIONS: Final = f"{_ONE}/expert_permissions"
_ADMIN: Final = (Role.ADMIN,)

OPERATIONS: Final[tuple[Operation[Any, Any], ...]] = (
    Operation(method="GET", path=_ALL, roles=OPERATORS, work=list_, query=ListProjects),
    Operation(method="POST", path=_ALL, roles=_ADMIN, work=create, body=CreateProject, query=Written),
    Operation(method="GET", path=_ONE, roles=READERS, work=retrieve),
    Operation(method="POST", path=_ONE, roles=_ADMIN, work=update, body=UpdateProject, query=Written),
    Operation(method="POST", path=f"{_ONE}/archive", roles=_ADMIN, work=archive, query=Written, withholds=_archived),
    Operation(method="GET", path=_PERMISSIONS, roles=READERS, work=show_permissions),
    Operation(
        method="POST",
        path=_PERMISSIONS,
        roles=_ADMIN,
        work=set_permissions,
        body=ExpertPermissions,
        query=Written,
        withholds=_unpermitted,
    ),
    Operation(
        method="DELETE",
        path=_PERMISSIONS,
        roles=_ADMIN,
        work=reset_permissions,
        query=Written,
        withholds=_unpermitted_all,
    ),
)
