"""Every operation of the administration."""

from __future__ import annotations

from typing import Any, Final

from flexgate.server.admin.agreements.endpoints import OPERATIONS as AGREEMENTS
from flexgate.server.admin.audit.endpoints import OPERATIONS as AUDIT
from flexgate.server.admin.keys.endpoints import OPERATIONS as KEYS
from flexgate.server.admin.operation import Operation
from flexgate.server.admin.policy.endpoints import OPERATIONS as POLICY
from flexgate.server.admin.projects.endpoints import OPERATIONS as PROJECTS
from flexgate.server.admin.quotas.endpoints import OPERATIONS as QUOTAS
from flexgate.server.experts.changes import OPERATIONS as EXPERT_CHANGES
from flexgate.server.experts.endpoints import OPERATIONS as EXPERTS

OPERATIONS: Final[tuple[Operation[Any, Any], ...]] = (
    *PROJECTS,
    *KEYS,
    *QUOTAS,
    *AGREEMENTS,
    *POLICY,
    *AUDIT,
    *EXPERTS,
    *EXPERT_CHANGES,
)
