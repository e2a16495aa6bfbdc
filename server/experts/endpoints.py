"""`GET /v1/experts`: which experts there are for the caller, and which of them it may use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flexgate.policies.decide import declared_context, find_tenant
from flexgate.policies.errors import PolicyError
from flexgate.policies.grants import grant
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.terms import TenantId
from flexgate.server.auth import Principal
from flexgate.server.context import identify
from flexgate.server.errors import NotFound
from flexgate.server.refusals import UNKNOWN_EXPERT, from_policy, reason_json
from flexgate.server.services import Services


class Experts:
    """The two routes. A tenant sees what is listed for it, an owner its own, an admin or auditor all."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def list(self, request: Request) -> Response:
        """Experts in catalogue order."""
        cards = await self._cards(request)
        return JSONResponse({"object": "list", "data": list(cards)})

    async def retrieve(self, request: Request) -> Response:
        """One expert; a hidden one is answered like a name that does not exist."""
        wanted = request.path_params["expert"]
        for card in await self._cards(request):
            if card["id"] == wanted:
                return JSONResponse(card)
        raise NotFound(
            "No expert of that name is listed for this key. GET /v1/experts shows those that are.",
            code=UNKNOWN_EXPERT,
        )

    async def _cards(self, request: Request) -> Iterator[dict[str, Any]]:
        principal, snapshot = await identify(request, self._services)
        if principal.tenant_id is not None:
            return self._for_tenant(snapshot, principal.tenant_id)
        return self._for_operator(snapshot, principal)

    def _for_tenant(self, snapshot: Snapshot, tenant_id: TenantId) -> Iterator[dict[str, Any]]:
        try:
            tenant = find_tenant(snapshot, tenant_id)
            context = declared_context(tenant, None, None)
            granted = grant(snapshot, tenant, context, self._services.clock())
        except PolicyError as error:
            raise from_policy(error) from error
        hidden = snapshot.hidden_from(tenant)
        for id_, expert in snapshot.experts.items():
            if id_ in hidden:
                continue
            reason = granted.refused.get(id_)
            yield {
                "id": id_,
                "object": "expert",
                "owner": expert.owner,
                "domain": expert.domain,
                "live": expert.live,
                "allowed": reason is None,
                "reason": None if reason is None else reason_json(reason),
            }

    def _for_operator(self, snapshot: Snapshot, principal: Principal) -> Iterator[dict[str, Any]]:
        loaded = {info.id: info for info in self._services.client.experts()}
        for id_, expert in snapshot.experts.items():
            if principal.owner_id not in (None, expert.owner):
                continue
            info = loaded.get(id_)
            yield {
                "id": id_,
                "object": "expert",
                "owner": expert.owner,
                "domain": expert.domain,
                "live": expert.live,
                "visibility": expert.visibility,
                "slot": None if info is None else info.slot,
                "generation": None if info is None else info.generation,
            }
