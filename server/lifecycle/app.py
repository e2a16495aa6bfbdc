"""The composition root of the HTTP side: every route that exists is listed here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterator
from typing import Final

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from flexgate.policies.documents import Role
from flexgate.server.admin.operation import Administration
from flexgate.server.admin.operations import OPERATIONS
from flexgate.server.http.auth import EVERY_ROLE
from flexgate.server.http.context import context_of
from flexgate.server.http.cors import TenantCors
from flexgate.server.http.errors import ApiError
from flexgate.server.http.health import Operations
from flexgate.server.http.middleware import Gateway
from flexgate.server.http.responses import of_error, of_http_error
from flexgate.server.inference.openai import chat, completions, responses
from flexgate.server.inference.openai.models import Models
from flexgate.server.inference.openai.tokenization import Tokenization
from flexgate.server.inference.pipeline import Generation
from flexgate.server.lifecycle.openapi import OpenApi
from flexgate.server.lifecycle.services import Services

Answer = Callable[[Request], Awaitable[Response]]
_OPERATORS: Final = EVERY_ROLE - {Role.TENANT}


def build_app(
    services: Services,
    *,
    hosts: Collection[str] | None = None,
    roles: Collection[Role] = EVERY_ROLE,
    origins: Collection[str] = (),
) -> FastAPI:
    """The server's application. `hosts` restricts the Host header; web pages of `origins` may call the tenants' routes.

    Keys of other `roles` are not known, and routes that only they may use do not exist.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    for method, path, endpoint in _endpoints(services, roles):
        app.add_route(path, _named(path, endpoint), [method])
    if origins:
        routes = [(method, path) for method, path, _ in _endpoints(services, {Role.TENANT})]
        app.add_middleware(TenantCors, origins=origins, routes=routes)
    app.add_middleware(Gateway, hosts=hosts, roles=roles, services=services)
    app.add_exception_handler(ApiError, of_error)
    app.add_exception_handler(HTTPException, of_http_error)
    return app


class Listeners:
    """Two applications, told apart by the address on this machine that a connection came in at."""

    def __init__(self, public: ASGIApp, admin: ASGIApp, admin_address: tuple[str, int]) -> None:
        self._public = public
        self._admin = admin
        self._admin_address = admin_address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection."""
        at_admin = tuple(scope.get("server") or ()) == self._admin_address
        await (self._admin if at_admin else self._public)(scope, receive, send)


def build_listeners(
    services: Services,
    admin_address: tuple[str, int],
    *,
    hosts: Collection[str] | None = None,
    origins: Collection[str] = (),
) -> Listeners:
    """Tenants at every address but one, everybody else there."""
    public = build_app(services, hosts=hosts, roles={Role.TENANT}, origins=origins)
    return Listeners(public, build_app(services, hosts=hosts, roles=_OPERATORS), admin_address)


def _endpoints(services: Services, roles: Collection[Role]) -> Iterator[tuple[str, str, Answer]]:
    if Role.TENANT in roles:
        yield from _inference(services)
    operations = Operations(services)
    if not _OPERATORS.isdisjoint(roles):
        yield "GET", "/metrics", operations.metrics
    for operation in OPERATIONS:
        if not set(operation.roles).isdisjoint(roles):
            yield operation.method, operation.path, Administration(services, operation).answer
    yield "GET", "/v1/openapi.json", OpenApi(services).document
    yield "GET", "/health", operations.health
    yield "GET", "/ready", operations.ready


def _inference(services: Services) -> Iterator[tuple[str, str, Answer]]:
    yield "POST", "/v1/chat/completions", Generation(services, chat.ENDPOINT).answer
    yield "POST", "/v1/completions", Generation(services, completions.ENDPOINT).answer
    yield "POST", "/v1/responses", Generation(services, responses.ENDPOINT).answer
    tokenization = Tokenization(services)
    yield "POST", "/tokenize", tokenization.tokenize
    yield "POST", "/detokenize", tokenization.detokenize
    models = Models(services)
    yield "GET", "/v1/models", models.list
    yield "GET", "/v1/models/{model:path}", models.retrieve


def _named(path: str, endpoint: Answer) -> Answer:
    """The endpoint, which tells the log and the metrics its route's template."""

    async def answer(request: Request) -> Response:
        context_of(request).route = path
        return await endpoint(request)

    return answer
