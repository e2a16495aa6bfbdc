"""`/health`, `/ready` and `/metrics`: what operators' machines ask."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flexgate.policies.documents import Role
from flexgate.server.http import metrics
from flexgate.server.http.context import identify
from flexgate.server.lifecycle.services import Services


class Operations:
    """The three routes. Health and readiness say a status and nothing else."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def health(self, request: Request) -> Response:  # noqa: ARG002 - a route's signature
        """Whether the process lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:  # noqa: ARG002 - a route's signature
        """Whether a request would be served: engine proved, policy confirmed, not stopping."""
        services = self._services
        ready = services.client.ready() and services.policy.fresh() and not services.draining
        status = "ready" if ready else "not_ready"
        return JSONResponse({"status": status}, status_code=200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """Prometheus metrics, for auditors and administrators."""
        _, snapshot = await identify(request, self._services, (Role.AUDITOR, Role.ADMIN))
        metrics.epochs(snapshot.policy_version, self._services.client.weights_epoch)
        queue = self._services.queue
        metrics.queue(queue.queued, queue.projects, queue.free)
        return Response(metrics.render(), media_type=metrics.CONTENT_TYPE)
