"""The outermost layer: request id, allowed hosts, one error body, one log line. Pure ASGI."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Collection
from contextlib import suppress
from typing import Any, Final, Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexgate.policies.documents import Role
from flexgate.policies.errors import PolicyError
from flexgate.server.http import metrics
from flexgate.server.http.auth import EVERY_ROLE, STATE, Callers, Context, InProgress, authenticate
from flexgate.server.http.errors import INTERNAL_MESSAGE, ApiError, Invalid
from flexgate.server.http.logs import FIELDS
from flexgate.server.http.refusals import is_denial
from flexgate.server.http.usage_metrics import USAGE
from flexgate.server.policy.denial_log import ANONYMOUS, Denial, Denials

MAX_QUERY_BYTES: Final = 8192
_ONCE: Final = frozenset(
    {b"authorization", b"host", b"content-type", b"content-length", b"content-encoding", b"transfer-encoding"}
)
"""Headers of which two could be read as two different requests, by this server and by what stands before it."""
_ELSEWHERE: Final = {False: "administration_at_public_address", True: "inference_at_administration_address"}
logger = logging.getLogger(__name__)


class Watched(Callers, Protocol):
    """What the middleware uses: the policy, and the denial log."""

    @property
    def denials(self) -> Denials: ...


class Middleware:
    """Wraps the routes. Nothing that a route raises leaves it."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        services: Watched,
        roles: Collection[Role] = EVERY_ROLE,
        hosts: Collection[str] | None = None,
    ) -> None:
        """`roles` are those whose keys are known; `hosts` the only names that a Host header may have,
        None allows all.
        """
        self._app = app
        self._services = services
        self._roles = roles
        self._hosts = None if hosts is None else frozenset(hosts)
        self._in_progress = InProgress()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = scope[STATE] = Context(f"req_{uuid.uuid4().hex}", self._roles, self._in_progress)
        exchange = _Exchange(scope, context, send)
        try:
            _check_headers(scope)
            _check_query(scope)
            self._check_host(scope)
            await self._app(scope, receive, exchange.send)
        except ApiError as error:
            await exchange.fail(error, receive)
        except ClientDisconnect:
            context.disconnected = True
        except Exception as error:
            logger.error("a request failed", exc_info=error, extra=_fields(context))
            failure = ApiError(INTERNAL_MESSAGE, code="internal_error")
            await exchange.fail(failure, receive)
        finally:
            context.leave()
            try:
                await self._note_stranger(scope, context)
            finally:
                exchange.log()
                self._note_denial(context, _route_of(scope))

    async def _note_stranger(self, scope: Scope, context: Context) -> None:
        """Note, once the response is sent, whether a refused key is valid at the server's other address."""
        header, policy = Headers(scope=scope).get("authorization"), self._services.policy
        if context.error is None or context.principal is not None or header is None or self._roles == EVERY_ROLE:
            return
        if not policy.fresh():  # this must not wait: it may be all that is left of a request
            return
        with suppress(ApiError, PolicyError):  # the lease may have run out since
            snapshot = await policy.current()
            key = authenticate(snapshot, header, self._services.clock(), EVERY_ROLE - set(self._roles))
            context.principal, context.elsewhere = key, _ELSEWHERE[key.role is Role.TENANT]

    def _note_denial(self, context: Context, route: str) -> None:
        error, caller = context.error, context.principal
        if error is not None and (context.elsewhere is not None or is_denial(error)):
            actor, tenant = (ANONYMOUS, None) if caller is None else (caller.key_id, caller.tenant_id)
            refused = (route, error.status, context.elsewhere or error.code, error.param, error.rules)
            self._services.denials.add(Denial(actor, tenant, *refused), context.request_id)
            USAGE.count_denial(error.rules)

    def _check_host(self, scope: Scope) -> None:
        if self._hosts is None:
            return
        host = Headers(scope=scope).get("host", "")
        if _without_port(host) not in self._hosts:
            raise Invalid(
                "The Host header names another server. Use the address that the server listens on.",
                param=None,
                code="wrong_host",
            )


class _Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, context: Context, send: Send) -> None:
        self._scope = scope
        self._context = context
        self._send = send
        self._status = 0
        self._began = time.perf_counter()

    async def send(self, message: Message) -> None:
        """Pass a message on; the first one gets the request's id."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._context.request_id
            headers["x-content-type-options"] = "nosniff"
        await self._send(message)

    async def fail(self, error: ApiError, receive: Receive) -> None:
        """Respond with an error; if a response has begun, close the connection."""
        self._context.error = error
        if self._status:
            raise ConnectionAbortedError("a response broke off")
        response = JSONResponse(error.body(), status_code=error.status, headers=error.headers)
        await response(self._scope, receive, self.send)

    def log(self) -> None:
        """One line and one count per request."""
        route = _route_of(self._scope)
        metrics.count_response(route, self._status)
        if self._status >= 400:
            metrics.count_refusal(self._context.code)
        if self._context.over is not None:
            self._context.over(self._status)
        elapsed = round((time.perf_counter() - self._began) * 1000, 1)
        logger.info("request", extra=_fields(self._context, route=route, status=self._status, ms=elapsed))


def _route_of(scope: Scope) -> str:
    """The template of the route that served a request, for the log and the metrics."""
    route = scope.get("route")
    return route.path if route is not None and scope["method"] in route.methods else "unmatched"


def _check_query(scope: Scope) -> None:
    """Refuse a long query string before anything takes it apart, which takes the event loop 1 ms for each kilobyte."""
    size = len(scope["query_string"])
    if size > MAX_QUERY_BYTES:
        message = f"The query string has {size} bytes: at most {MAX_QUERY_BYTES} are read."
        raise Invalid(message, param=None, code="invalid_value")


def _check_headers(scope: Scope) -> None:
    seen = set()
    for name, _ in scope["headers"]:
        if name in seen and (name in _ONCE or name.startswith(b"x-flexgate-")):
            raise Invalid(
                f"The header '{name.decode('latin-1')}' is sent twice. Send it once.",
                param=None,
                code="duplicate_header",
            )
        seen.add(name)


def _fields(context: Context, **more: Any) -> dict[str, Any]:
    return {FIELDS: {"request": context.request_id, **more, **context.log_fields()}}


def _without_port(host: str) -> str:
    name, separator, port = host.rpartition(":")
    return name if separator and port.isdigit() else host
