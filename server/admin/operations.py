"""Every operation of the administration, with its route."""

from __future__ import annotations

from typing import Any, Final

from flexgate.server.admin.agreements.endpoints import router as agreements
from flexgate.server.admin.audit.endpoints import router as audit
from flexgate.server.admin.corrections.endpoints import router as corrections
from flexgate.server.admin.costs.endpoints import router as costs
from flexgate.server.admin.keys.endpoints import router as keys
from flexgate.server.admin.operation import Operation
from flexgate.server.admin.policy.endpoints import router as policy
from flexgate.server.admin.projects.endpoints import router as projects
from flexgate.server.admin.quotas.endpoints import router as quotas
from flexgate.server.admin.receipts.endpoints import router as receipts
from flexgate.server.admin.sets.endpoints import router as sets
from flexgate.server.admin.statements.closing import router as closings
from flexgate.server.admin.statements.endpoints import router as statements
from flexgate.server.admin.statements.signed import router as signed_statements
from flexgate.server.admin.usage.endpoints import router as usage
from flexgate.server.experts.changes import router as expert_changes
from flexgate.server.experts.endpoints import router as experts

_ROUTERS: Final = (
    projects,
    keys,
    quotas,
    agreements,
    sets,
    policy,
    audit,
    usage,
    costs,
    corrections,
    statements,
    signed_statements,
    closings,
    receipts,
    experts,
    expert_changes,
)
ROUTES: Final = tuple(route for router in _ROUTERS for route in router.declared())
OPERATIONS: Final[tuple[Operation[Any, Any], ...]] = tuple(route.operation for route in ROUTES)
