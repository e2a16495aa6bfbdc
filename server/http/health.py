"""`/health`, `/ready` and `/metrics`, for an operator's monitoring."""

from __future__ import annotations

from typing import Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flexgate.policies.documents import Role
from flexgate.server.http import metrics
from flexgate.server.http.auth import Callers, identify
from flexgate.server.ledger.entries import State
from flexgate.server.ledger.errors import LedgerFailure
from flexgate.server.policy.executors import METRICS, run_in


class Engine(Protocol):
    """The part of the engine that probes use."""

    @property
    def weights_epoch(self) -> int: ...
    def ready(self) -> bool: ...


class Queue(Protocol):
    """The part of the queue that metrics show."""

    @property
    def queued(self) -> int: ...
    @property
    def projects(self) -> int: ...
    @property
    def free(self) -> int: ...


class Ledger(Protocol):
    """The part of the ledger that probes use."""

    @property
    def failing(self) -> bool: ...
    def state(self) -> State: ...


class Budgets(Protocol):
    """The part of budget usage that metrics show."""

    def lapsed(self) -> int: ...
    def unwritable(self) -> bool: ...


class Probed(Callers, Protocol):
    """The services that probes and metrics use."""

    @property
    def client(self) -> Engine: ...
    @property
    def queue(self) -> Queue: ...
    @property
    def ledger(self) -> Ledger: ...
    @property
    def budget_usage(self) -> Budgets: ...
    @property
    def ledger_failure(self) -> LedgerFailure: ...
    @property
    def draining(self) -> bool: ...


class Operations:
    """The three routes. Health and readiness say a status and nothing else."""

    def __init__(self, services: Probed) -> None:
        self._services = services

    async def health(self, request: Request) -> Response:  # noqa: ARG002 - a route's signature
        """Whether the process lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:  # noqa: ARG002 - a route's signature
        """Whether a request would be served: engine proved, policy confirmed, ledger written, not stopping."""
        ready = self._is_ready()
        return JSONResponse({"status": "ready" if ready else "not_ready"}, status_code=200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """Prometheus metrics, for auditors and administrators."""
        _, snapshot = await identify(request, self._services, (Role.AUDITOR, Role.ADMIN))
        metrics.ready(self._is_ready())
        metrics.epochs(snapshot.policy_version, self._services.client.weights_epoch)
        queue = self._services.queue
        metrics.queue(queue.queued, queue.projects, queue.free)
        metrics.ledger(self._services.ledger.state())
        usage = self._services.budget_usage
        metrics.budgets(usage.lapsed(), usage.unwritable())
        return Response(await run_in(METRICS, metrics.render), media_type=metrics.CONTENT_TYPE)

    def _is_ready(self) -> bool:
        services = self._services
        recorded = not services.ledger.failing or services.ledger_failure == "serve"
        usable = services.client.ready() and services.policy.fresh() and recorded
        return usable and not services.draining
