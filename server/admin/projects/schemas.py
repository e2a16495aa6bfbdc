"""Projects as OpenAI's clients know them; what only flexgate has is under `flexgate`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field

from flexgate.policies.agreements import Line, PurposeField, RegionField, SetOf
from flexgate.policies.compiled.compiler import TenantRules
from flexgate.policies.documents import References, Tenant
from flexgate.policies.ids import ExpertReference, GroupIdField, SetId
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.store.projects import Times
from flexgate.server.admin.operation import Page
from flexgate.server.admin.pages import Identified, PageOf
from flexgate.server.http.schemas import Shown, is_none
from flexgate.server.http.validation import Closed

Mode = Literal["allow_list", "deny_list"]


class OwnFields(Closed):
    """Fields that only flexgate has. Omitted fields stay as they are."""

    groups: SetOf[GroupIdField] = frozenset()
    purposes: SetOf[PurposeField] = frozenset()
    regions: SetOf[RegionField] = frozenset()
    default_experts: SetOf[ExpertReference] | None = None
    anchor_optional: bool = False
    min_grade: Literal["shared", "router", "removed"] | None = None
    hidden: References = frozenset()
    listed: References = frozenset()


class CreateProject(Closed):
    """A new project gets `public` and nothing else."""

    name: Line
    flexgate: OwnFields = OwnFields()


class UpdateProject(Closed):
    """Omitted fields stay as they are."""

    name: Line | None = None
    flexgate: OwnFields = OwnFields()

    def fields(self) -> dict[str, Any]:
        """The tenant's fields that change."""
        named = {} if self.name is None else {"name": self.name}
        return {**named, **self.flexgate.model_dump(exclude_unset=True)}


class ListProjects(Page):
    """Archived projects only if asked for."""

    include_archived: bool = False


class PermissionsBefore(Closed):
    """The expert permissions that a change was made for."""

    mode: Mode
    expert_ids: References


class ExpertPermissions(PermissionsBefore):
    """`allow_list`: these experts, where agreements permit them. `deny_list`: all permitted experts but these.

    With `before`, the change is refused unless the permissions are still those.
    """

    before: PermissionsBefore | None = None


class ProjectFields(Shown):
    """What OpenAI's projects do not have. Administrators and auditors see which experts are hidden from a project."""

    groups: list[str]
    purposes: list[str]
    regions: list[str]
    default_experts: list[str] | None
    anchor_optional: bool
    min_grade: Literal["shared", "router", "removed"] | None
    hidden: Annotated[list[str] | None, Field(exclude_if=is_none)] = None
    listed: Annotated[list[str] | None, Field(exclude_if=is_none)] = None


class ProjectObject(Identified):
    """A project."""

    object: Literal["organization.project"] = "organization.project"
    name: str
    created_at: int
    archived_at: int | None
    status: Literal["active", "archived"]
    flexgate: ProjectFields


class ProjectPage(PageOf[ProjectObject]):
    """A part of the list of projects."""


class PermissionsObject(Shown):
    """The expert permissions of a project."""

    object: Literal["project.expert_permissions"] = "project.expert_permissions"
    mode: Mode
    expert_ids: list[str]


class PermissionsDeleted(Shown):
    """The expert permissions of a project went back to an empty allow list."""

    object: Literal["project.expert_permissions.deleted"] = "project.expert_permissions.deleted"
    deleted: Literal[True] = True


def project_object(tenant: Tenant, times: Times, *, operator: bool) -> ProjectObject:
    """A project; `operator` sees which experts are hidden from it."""
    own = ProjectFields(
        groups=sorted(tenant.groups),
        purposes=sorted(tenant.purposes),
        regions=sorted(tenant.regions),
        default_experts=None if tenant.default_experts is None else sorted(tenant.default_experts),
        anchor_optional=tenant.anchor_optional,
        min_grade=tenant.min_grade,
        hidden=sorted(tenant.hidden) if operator else None,
        listed=sorted(tenant.listed) if operator else None,
    )
    return ProjectObject(
        id=tenant.id,
        name=tenant.name,
        created_at=int(times.created),
        archived_at=None if times.archived is None else int(times.archived),
        status="archived" if tenant.archived else "active",
        flexgate=own,
    )


def permissions_object(mode: Mode, expert_ids: Iterable[str]) -> PermissionsObject:
    """The expert permissions of a project."""
    return PermissionsObject(mode=mode, expert_ids=sorted(expert_ids))


def listed(references: Iterable[str], snapshot: Snapshot, rules: TenantRules, now: float) -> list[str]:
    """The references that stand for at least one expert that is not hidden from the tenant."""
    shown = []
    hidden = snapshot.hidden_from(rules, now)
    for reference in references:
        members = snapshot.sets.get(SetId(reference), frozenset({reference}))
        if members - hidden:
            shown.append(reference)
    return shown
