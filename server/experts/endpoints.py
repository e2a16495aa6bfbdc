"""`GET /v1/experts`: which experts there are for the caller, and which of them it may use.

A tenant sees what is listed for it, an owner its own, an administrator or auditor all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from flexgate.policies.decide import declared_context, find_tenant
from flexgate.policies.documents import Role
from flexgate.policies.entitlements import entitlements
from flexgate.policies.ids import TenantId
from flexgate.server.admin.operation import Call, Nothing
from flexgate.server.admin.router import OperationRouter
from flexgate.server.experts.schemas import ExpertForOperator, ExpertForTenant, ExpertList
from flexgate.server.http.errors import NotFound
from flexgate.server.http.refusals import UNKNOWN_EXPERT, reason_json
from flexgate.server.http.schemas import Reason

_Read = Call[Nothing, Nothing]


_EVERY_ROLE: Final = (Role.ADMIN, Role.AUDITOR, Role.OWNER, Role.TENANT)
router: Final = OperationRouter()


@router.operation("GET", "/v1/experts", roles=_EVERY_ROLE)
def list_(call: _Read) -> ExpertList:
    """List the experts that this key sees, and whether it may use them."""
    return ExpertList(data=list(_cards(call)))


@router.operation("GET", "/v1/experts/{expert}", roles=_EVERY_ROLE)
def retrieve(call: _Read) -> ExpertForTenant | ExpertForOperator:
    """Show one expert. A hidden one gets the same response as an unknown name."""
    for card in _cards(call):
        if card.id == call.path["expert"]:
            return card
    raise NotFound(
        "No expert of that name is visible to this key. GET /v1/experts lists the visible ones.",
        code=UNKNOWN_EXPERT,
    )


def _cards(call: _Read) -> Iterator[ExpertForTenant] | Iterator[ExpertForOperator]:
    """In catalogue order."""
    tenant = call.principal.tenant_id
    return _for_operator(call) if tenant is None else _for_tenant(call, tenant)


def _for_tenant(call: _Read, tenant_id: TenantId) -> Iterator[ExpertForTenant]:
    snapshot = call.snapshot
    tenant = find_tenant(snapshot, tenant_id)
    entitled = entitlements(snapshot, tenant, declared_context(tenant, None, None), call.now)
    hidden = snapshot.hidden_from(tenant, call.now)
    for id_, expert in snapshot.experts.items():
        if id_ in hidden:
            continue
        reason = entitled.refused.get(id_)
        yield ExpertForTenant(
            id=id_,
            owner=expert.owner,
            domain=expert.domain,
            grade=expert.grade,
            live=expert.live,
            allowed=reason is None,
            reason=None if reason is None else Reason(**reason_json(reason)),
        )


def _for_operator(call: _Read) -> Iterator[ExpertForOperator]:
    loaded = {info.id: info for info in call.services.client.experts()}
    for id_, expert in call.snapshot.experts.items():
        if call.principal.owner_id not in (None, expert.owner):
            continue
        info = loaded.get(id_)
        yield ExpertForOperator(
            id=id_,
            owner=expert.owner,
            domain=expert.domain,
            grade=expert.grade,
            live=expert.live,
            visibility=expert.visibility,
            slot=None if info is None else info.slot,
            slot_epoch=None if info is None else info.slot_epoch,
        )
