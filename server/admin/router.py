"""Operations of the administration as FastAPI routes: declared once, authorised, read and answered alike.

A route's operation decides who may call it. Each step is a dependency of the next, in the order in which a request is
refused: who calls (401), what its role may do (403), names in the path (404), query and body (400).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Final, TypeVar, cast

from fastapi import APIRouter, Depends
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from flexgate.policies.documents import Role
from flexgate.policies.errors import PolicyError, StoreUnavailable
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.withhold import Withholding
from flexgate.server.admin.concurrency_limit import in_turn, threads_of
from flexgate.server.admin.operation import AdminServices, Call, Method, Nothing, Operation, Unread, Written
from flexgate.server.http.auth import CHANGE_PATIENCE_S, Principal, context_of, identify, recognise
from flexgate.server.http.errors import ApiError, Unavailable
from flexgate.server.http.refusals import from_change, not_found
from flexgate.server.http.responses import OK
from flexgate.server.http.routes import Route, require_declared
from flexgate.server.http.validation import parse_query, read_body
from flexgate.server.policy.executors import CHANGES, run_in

_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,80}")
_JSON: Final = "application/json"
W = TypeVar("W", bound=Callable[..., Any])
logger = logging.getLogger(__name__)


class OperationRoute(Route):
    """A route of the administration. It is served in the name of its operation, and of nothing else."""

    def __init__(self, operation: Operation[Any, Any]) -> None:
        resource = operation.work.__module__.split(".")[-2]
        super().__init__(
            operation.path,
            respond,
            method=operation.method,
            roles=operation.roles,
            status=operation.status,
            body=None if operation.body in (Nothing, Unread) else operation.body,
            query=operation.query,
            events=operation.events,
            response_model=operation.response,
            summary=operation.summary,
            description=f"Roles: {', '.join(operation.roles)}.",
            operation_id=f"{resource}_{operation.work.__name__.strip('_')}",
            tags=[resource],
        )
        self.operation = operation


class OperationRouter(APIRouter):
    """The routes of one resource."""

    def declared(self) -> tuple[OperationRoute, ...]:
        """Its routes; raises `UndeclaredRoute` for one without an operation."""
        require_declared(self.routes, OperationRoute)
        return tuple(cast(list[OperationRoute], self.routes))

    def operation(
        self,
        method: Method,
        path: str = "",
        *,
        roles: tuple[Role, ...],
        status: int = OK,
        patient: bool = False,
        withholds: Callable[[Call[Any, Any]], Withholding] | None = None,
        threads: ThreadPoolExecutor | None = None,
        response: type[BaseModel] | None = None,
    ) -> Callable[[W], W]:
        """Declare a function as an operation: `Call[Body, Query]` and what it returns are its models.

        What may return an `EventStream` sends the same model as events. `response` is the model of what is returned as
        JSON.
        """

        def declare(work: W) -> W:
            operation = Operation.of(
                work,
                method=method,
                path=f"{self.prefix}{path}",
                roles=roles,
                status=status,
                patient=patient,
                withholds=withholds,
                threads=threads,
                **({} if response is None else {"returns": response}),
            )
            self.routes.append(OperationRoute(operation))
            return work

        return declare


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls an operation that its role may call, and the snapshot that knows it."""

    principal: Principal
    snapshot: Snapshot


def _operation_of(request: Request) -> Operation[Any, Any]:
    operation: Operation[Any, Any] = request.scope["route"].operation
    return operation


def _services_of(request: Request) -> AdminServices:
    services: AdminServices = request.app.state.services
    return services


async def authorised(request: Request) -> Caller:
    """Authenticate the key, and require a role of the route's operation."""
    operation = _operation_of(request)
    patience = CHANGE_PATIENCE_S if operation.writes or operation.patient else None
    return Caller(*await identify(request, _services_of(request), operation.roles, patience=patience))


async def called(request: Request, caller: Annotated[Caller, Depends(authorised)]) -> Call[Any, Any]:
    """Check what the path, the query and the body say."""
    operation, services = _operation_of(request), _services_of(request)
    if not all(_ID.fullmatch(value) for value in request.path_params.values()):
        raise not_found()
    query = parse_query(request.query_params.multi_items(), operation.query)
    body = Unread() if operation.body is Unread else await read_body(request, services, operation.body)
    path, now = dict(request.path_params), services.clock()
    return Call(services, caller.principal, caller.snapshot, path, query, body, now, request)


async def respond(call: Annotated[Call[Any, Any], Depends(called)]) -> Response:
    """Do it, and answer once the change is enforced, everywhere if that is asked for.

    What grows with what is stored, the response's JSON included, is made in a thread.
    """
    operation, snapshot = _operation_of(call.request), call.snapshot
    try:
        if operation.on_loop:
            result = await operation.work(call)
            content = result if isinstance(result, Response) else to_json(result)
        else:
            threads = operation.threads or threads_of(call.principal, operation.writes)
            content, snapshot = await in_turn(call.principal, threads, _work, operation, call)
    except PolicyError as error:
        if isinstance(error, StoreUnavailable) and await _withheld(operation, call):
            raise _not_stored() from error
        refusal = from_change(error)
        if isinstance(refusal, Unavailable):
            logger.error("the policy store cannot be used: %s", error)
        raise refusal from error
    if isinstance(content, Response):
        return content
    if isinstance(call.query, Written) and call.query.wait == "all":
        await _everywhere(call.services, snapshot)
    headers = {**call.headers, "x-flexgate-policy-version": str(snapshot.policy_version)}
    return Response(content, operation.status, headers, media_type=_JSON)


def _work(operation: Operation[Any, Any], call: Call[Any, Any]) -> tuple[bytes | Response, Snapshot]:
    """The response's body, and the snapshot that it is from: a changed one, once this process enforces it. Blocks.

    The key is judged once more: it may have been revoked while the call waited for its thread.
    """
    policy = call.services.policy
    newest = policy.without_withheld(policy.stored or call.snapshot)
    recognise(newest, call.principal.digest, call.services.clock(), context_of(call.request).roles)
    result = operation.work(call)
    content = result if isinstance(result, Response) else to_json(result)
    if not operation.writes:
        return content, call.snapshot
    try:
        return content, call.services.policy.confirm()
    except PolicyError as error:
        raise _not_confirmed() from error


async def _withheld(operation: Operation[Any, Any], call: Call[Any, Any]) -> bool:
    """Whether a revocation that could not be stored is enforced, until it is."""
    if operation.withholds is None:
        return False
    name = operation.method, call.request.url.path, call.principal.owner_id or "operator"
    withholding, store = operation.withholds(call), partial(operation.work, call)
    return await run_in(CHANGES, call.services.unstored.add, name, withholding, store)


def _not_stored() -> ApiError:
    return Unavailable(
        "The change could not be stored in the policy database. This server enforces the revocation and keeps "
        "trying to store it. Until then other servers allow what it takes away, and so would a restart of this "
        "one: repair the database first.",
        code="change_not_stored",
    )


async def _everywhere(services: AdminServices, snapshot: Snapshot) -> None:
    try:
        await services.policy.everywhere(snapshot.policy_version)
    except PolicyError as error:
        raise _not_confirmed() from error


def _not_confirmed() -> Unavailable:
    return Unavailable(
        "The change is stored, but not confirmed to be in force on all servers. Do not repeat it; check that they run.",
        code="change_not_confirmed",
    )
