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
from flexgate.server.admin.operation import Call, Nothing, Written
from flexgate.server.admin.pages import page_of
from flexgate.server.admin.projects.schemas import (
    CreateProject,
    ExpertPermissions,
    ListProjects,
    Mode,
    PermissionsDeleted,
    PermissionsObject,
    ProjectObject,
    ProjectPage,
    UpdateProject,
    listed,
    permissions_object,
    project_object,
)
from flexgate.server.admin.router import OperationRouter
from flexgate.server.http.refusals import not_found

OPERATORS: Final = (Role.ADMIN, Role.AUDITOR)
READERS: Final = (Role.ADMIN, Role.AUDITOR, Role.TENANT)


_ALL: Final = "/v1/organization/projects"
_ONE: Final = f"{_ALL}/{{project_id}}"
_PERMISSIONS: Final = f"{_ONE}/expert_permissions"
_ADMIN: Final = (Role.ADMIN,)
router: Final = OperationRouter()


def _archived(call: Call[Any, Any]) -> Withholding:
    return partial(without_tenant, tenant_id=call.path["project_id"])


def _unpermitted(call: Call[ExpertPermissions, Written]) -> Withholding:
    body = call.body
    return partial(
        listing_only, tenant_id=call.path["project_id"], mode=body.mode, expert_ids=frozenset(body.expert_ids)
    )


def _unpermitted_all(call: Call[Any, Any]) -> Withholding:
    return partial(listing_only, tenant_id=call.path["project_id"], mode="allow_list", expert_ids=frozenset())


def visible_project(call: Call[Any, Any]) -> Tenant:
    """The project in the path; raises `NotFound` for absent and another tenant's alike."""
    project_id = call.path["project_id"]
    if call.principal.tenant_id not in (None, project_id):
        raise not_found()
    return projects.get_project(call.store, project_id)


@router.operation("POST", _ALL, roles=_ADMIN)
def create(call: Call[CreateProject, Written]) -> ProjectObject:
    """Create a project. At first it may use `public` alone."""
    fields = call.body.flexgate.model_dump(exclude_unset=True)
    tenant = projects.create_project(call.store, call.body.name, fields=fields, **call.attributed)
    return project_object(tenant, Times(call.now, None), operator=True)


@router.operation("GET", _ALL, roles=OPERATORS)
def list_(call: Call[Nothing, ListProjects]) -> ProjectPage:
    """List projects, oldest first."""
    tenants = projects.list_projects(call.store, archived=call.query.include_archived)
    chosen, more = page_of(tenants, call.query, lambda tenant: tenant.id)
    times = projects.project_times(call.store, [tenant.id for tenant in chosen])
    return ProjectPage.of([project_object(t, times[t.id], operator=True) for t in chosen], more=more)


@router.operation("GET", _ONE, roles=READERS)
def retrieve(call: Call[Nothing, Nothing]) -> ProjectObject:
    """Show one project."""
    return _shown(call, visible_project(call))


@router.operation("POST", _ONE, roles=_ADMIN)
def update(call: Call[UpdateProject, Written]) -> ProjectObject:
    """Change a project's name, or fields that only flexgate has."""
    project_id = call.path["project_id"]
    return _shown(call, projects.update_project(call.store, project_id, call.body.fields(), **call.attributed))


@router.operation("POST", f"{_ONE}/archive", roles=_ADMIN, withholds=_archived)
def archive(call: Call[Nothing, Written]) -> ProjectObject:
    """Archive a project for good, and revoke its keys."""
    return _shown(call, projects.archive_project(call.store, call.path["project_id"], **call.attributed))


@router.operation("GET", _PERMISSIONS, roles=READERS)
def show_permissions(call: Call[Nothing, Nothing]) -> PermissionsObject:
    """Show which experts a project's list allows or denies."""
    tenant = visible_project(call)
    ids = list(tenant.expert_ids)
    if call.principal.tenant_id is not None:
        ids = listed(ids, call.snapshot, call.snapshot.tenants[tenant.id], call.now)
    return permissions_object(tenant.mode, ids)


@router.operation("POST", _PERMISSIONS, roles=_ADMIN, withholds=_unpermitted)
def set_permissions(call: Call[ExpertPermissions, Written]) -> PermissionsObject:
    """Set which experts a project's list allows or denies. Agreements must permit them, too."""
    before = call.body.before
    return _permit(call, call.body.mode, call.body.expert_ids, None if before is None else before.model_dump())


@router.operation("DELETE", _PERMISSIONS, roles=_ADMIN, withholds=_unpermitted_all)
def reset_permissions(call: Call[Nothing, Written]) -> PermissionsDeleted:
    """Reset a project to an empty allow list."""
    _permit(call, "allow_list", frozenset())
    return PermissionsDeleted()


def _permit(
    call: Call[Any, Written], mode: Mode, expert_ids: frozenset[str], before: dict[str, Any] | None = None
) -> PermissionsObject:
    fields = {"mode": mode, "expert_ids": expert_ids}
    tenant = projects.update_project(call.store, call.path["project_id"], fields, before=before, **call.attributed)
    return permissions_object(tenant.mode, tenant.expert_ids)


def _shown(call: Call[Any, Any], tenant: Tenant) -> ProjectObject:
    times = projects.project_times(call.store, [tenant.id])[tenant.id]
    if call.principal.tenant_id is not None and tenant.default_experts is not None:
        default_experts = listed(tenant.default_experts, call.snapshot, call.snapshot.tenants[tenant.id], call.now)
        tenant = tenant.model_copy(update={"default_experts": frozenset(default_experts)})
    return project_object(tenant, times, operator=call.principal.role in OPERATORS)
