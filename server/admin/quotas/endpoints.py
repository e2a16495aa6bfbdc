"""`…/rate_limits`: requests and tokens per minute, requests at once, and a budget of tokens."""

from __future__ import annotations

from typing import Any, Final

from flexgate.policies.documents import Quota, Role, Tenant
from flexgate.policies.store import projects
from flexgate.policies.store.accounts import list_project_keys
from flexgate.server.admin.operation import Call, Nothing, Written
from flexgate.server.admin.pages import page_of
from flexgate.server.admin.projects.endpoints import READERS, visible_project
from flexgate.server.admin.quotas.schemas import (
    PREFIX,
    PROJECT,
    ListRateLimits,
    RateLimitObject,
    RateLimitPage,
    UpdateRateLimit,
    rate_limit_object,
)
from flexgate.server.admin.router import OperationRouter
from flexgate.server.http.refusals import not_found

_ALL: Final = "/v1/organization/projects/{project_id}/rate_limits"
router: Final = OperationRouter()


@router.operation("GET", _ALL, roles=READERS)
def list_(call: Call[Nothing, ListRateLimits]) -> RateLimitPage:
    """List a project's limits, then those of its keys. A project's own key sees them, too."""
    quotas = _quotas(call, visible_project(call))
    chosen, more = page_of(list(quotas), call.query, str)
    return RateLimitPage.of([_shown(call, id_, quotas[id_]) for id_ in chosen], more=more)


@router.operation("POST", f"{_ALL}/{{rate_limit_id}}", roles=(Role.ADMIN,))
def update(call: Call[UpdateRateLimit, Written]) -> RateLimitObject:
    """Set limits of a project or of one of its keys."""
    id_ = call.path["rate_limit_id"]
    if not id_.startswith(PREFIX):
        raise not_found()
    key_id = None if id_ == PROJECT else id_.removeprefix(PREFIX)
    project_id = call.path["project_id"]
    quota = projects.set_quota(call.store, project_id, call.body.fields(), key_id=key_id, **call.attributed)
    return _shown(call, id_, quota)


def _quotas(call: Call[Any, Any], tenant: Tenant) -> dict[str, Quota]:
    """By the id of the rate limit: the project's, then those of the keys that the caller may know of."""
    if call.principal.tenant_id is not None:
        keys = [call.principal.key_id]
    else:
        keys = [key.key_id for key in list_project_keys(call.store, tenant.id)]
    return {PROJECT: tenant.quota, **{f"{PREFIX}{key}": tenant.key_quotas.get(key, Quota()) for key in keys}}


def _shown(call: Call[Any, Any], id_: str, quota: Quota) -> RateLimitObject:
    return rate_limit_object(id_, quota, call.services.model_names[0])
