"""Projects as OpenAI's clients know them; what only flexgate has is under `flexgate`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Literal

from flexgate.policies.agreements import PurposeField, RegionField, SetOf
from flexgate.policies.compiled.compiler import TenantRules
from flexgate.policies.documents import References, Tenant, Title
from flexgate.policies.ids import ExpertReference, GroupIdField, SetId
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.store.projects import Times
from flexgate.server.admin.operation import Json, Page
from flexgate.server.http.validation import Closed

_OWN_FIELDS: Final = ("groups", "purposes", "regions", "default_experts", "anchor_optional")
_OPERATOR_FIELDS: Final = ("hidden", "listed")


class OwnFields(Closed):
    """What OpenAI's projects do not have. A field that is left out stays as it is."""

    groups: SetOf[GroupIdField] = frozenset()
    purposes: SetOf[PurposeField] = frozenset()
    regions: SetOf[RegionField] = frozenset()
    default_experts: SetOf[ExpertReference] | None = None
    anchor_optional: bool = False
    hidden: References = frozenset()
    listed: References = frozenset()


class CreateProject(Closed):
    """A new project gets `public` and nothing else."""

    name: Title
    flexgate: OwnFields = OwnFields()


class UpdateProject(Closed):
    """Fields that are left out stay as they are."""

    name: Title | None = None
    flexgate: OwnFields = OwnFields()

    def fields(self) -> dict[str, Any]:
        """The tenant's fields that change."""
        named = {} if self.name is None else {"name": self.name}
        return {**named, **self.flexgate.model_dump(exclude_unset=True)}


class ListProjects(Page):
    """Archived projects only if asked for."""

    include_archived: bool = False


class ExpertPermissions(Closed):
    """`allow_list`: only these, where agreements permit them. `deny_list`: all but these."""

    mode: Literal["allow_list", "deny_list"]
    expert_ids: References


def project_object(tenant: Tenant, times: Times, *, operator: bool) -> Json:
    """A project; `operator` sees which experts are hidden from it."""
    values = tenant.model_dump(mode="json")
    fields = _OWN_FIELDS + (_OPERATOR_FIELDS if operator else ())
    own = {name: _sorted(values[name]) for name in fields}
    return {
        "id": tenant.id,
        "object": "organization.project",
        "name": tenant.name,
        "created_at": int(times.created),
        "archived_at": None if times.archived is None else int(times.archived),
        "status": "archived" if tenant.archived else "active",
        "flexgate": own,
    }


def permissions_object(mode: str, expert_ids: Iterable[str]) -> Json:
    """The expert permissions of a project."""
    return {"object": "project.expert_permissions", "mode": mode, "expert_ids": sorted(expert_ids)}


def listed(references: Iterable[str], snapshot: Snapshot, rules: TenantRules) -> list[str]:
    """The references that stand for at least one expert that is not hidden from the tenant."""
    shown = []
    hidden = snapshot.hidden_from(rules)
    for reference in references:
        members = snapshot.sets.get(SetId(reference), frozenset({reference}))
        if members - hidden:
            shown.append(reference)
    return shown


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value
