"""The composition root of the HTTP side: every route that exists is listed here."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any, Final, cast

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from flexgate.policies.documents import Role
from flexgate.server.admin.operations import ROUTES
from flexgate.server.http.auth import EVERY_ROLE
from flexgate.server.http.cors import TenantCors
from flexgate.server.http.errors import ApiError
from flexgate.server.http.health import Operations
from flexgate.server.http.keys import JwkSet, KeySet
from flexgate.server.http.middleware import Middleware
from flexgate.server.http.responses import of_error, of_http_error
from flexgate.server.http.routes import ANYONE, PlainRoute, Route, require_declared
from flexgate.server.http.schemas import ProbeStatus
from flexgate.server.inference.generation import Generation
from flexgate.server.inference.openai import chat, completions, responses, schemas
from flexgate.server.inference.openai.models import Models
from flexgate.server.inference.openai.tokenization import Tokenization
from flexgate.server.lifecycle.openapi import OpenApi, described
from flexgate.server.lifecycle.services import Services

_TENANTS: Final = frozenset({Role.TENANT})
_OPERATORS: Final = EVERY_ROLE - _TENANTS


def build_app(
    services: Services,
    *,
    hosts: Collection[str] | None = None,
    roles: Collection[Role] = EVERY_ROLE,
    origins: Collection[str] = (),
) -> FastAPI:
    """The server's application. `hosts` restricts the Host header; web pages of `origins` may call the tenants' routes.

    Keys of other `roles` are not known, and routes that only they may use do not exist. Raises `UndeclaredRoute` for a
    route that does not say who may use it.
    """
    app = FastAPI(
        routes=list(routes(services, roles)), openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.services = services
    require_declared(app.routes)
    if origins:
        shared = [(route.method, route.path) for route in routes(services, _TENANTS)]
        app.add_middleware(TenantCors, origins=origins, routes=shared)
    app.add_middleware(Middleware, hosts=hosts, roles=roles, services=services)
    app.add_exception_handler(ApiError, of_error)
    app.add_exception_handler(HTTPException, of_http_error)
    return app


def document() -> dict[str, Any]:
    """OpenAPI 3.1, of every route; no route is called for it."""
    return described(list(routes(cast(Services, None), EVERY_ROLE)))


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


def routes(services: Services, roles: Collection[Role]) -> Iterator[Route]:
    """Every route of an address where keys of some roles are known."""
    if Role.TENANT in roles:
        yield from _inference(services)
    if not _OPERATORS.isdisjoint(roles):
        yield from _metrics(services)
    yield from (route for route in ROUTES if not route.roles.isdisjoint(roles))
    yield from _probes(services)


def _inference(services: Services) -> Iterator[Route]:
    tokenization, models = Tokenization(services), Models(services)
    post = partial(PlainRoute, method="POST", roles=_TENANTS)
    get = partial(PlainRoute, method="GET", roles=EVERY_ROLE)
    yield post(
        "/v1/chat/completions",
        Generation(services, chat.ENDPOINT).respond,
        body=schemas.ChatBody,
        response_model=schemas.ChatCompletion,
        events=schemas.ChatCompletionChunk,
        operation_id="chat_completions_create",
        summary="Answer a conversation.",
    )
    yield post(
        "/v1/completions",
        Generation(services, completions.ENDPOINT).respond,
        body=schemas.CompletionBody,
        response_model=schemas.Completion,
        events=schemas.CompletionChunk,
        operation_id="completions_create",
        summary="Continue a text.",
    )
    yield post(
        "/v1/responses",
        Generation(services, responses.ENDPOINT).respond,
        body=schemas.ResponsesBody,
        response_model=schemas.ModelResponse,
        events=schemas.ResponseEvent,
        operation_id="responses_create",
        summary="Answer an input. Nothing is stored.",
    )
    yield post(
        "/tokenize",
        tokenization.tokenize,
        body=schemas.TokenizeBody,
        response_model=schemas.TokenIds,
        operation_id="tokenize",
        summary="Convert text or messages to token ids.",
    )
    yield post(
        "/detokenize",
        tokenization.detokenize,
        body=schemas.DetokenizeBody,
        response_model=schemas.DetokenizedText,
        operation_id="detokenize",
        summary="Convert token ids to text.",
    )
    yield get(
        "/v1/models",
        models.list,
        response_model=schemas.ModelList,
        operation_id="models_list",
        summary="List the model's names.",
    )
    yield get(
        "/v1/models/{model:path}",
        models.retrieve,
        response_model=schemas.Model,
        operation_id="models_retrieve",
        summary="Show one of the model's names.",
    )


def _metrics(services: Services) -> Iterator[Route]:
    yield PlainRoute(
        "/metrics",
        Operations(services).metrics,
        method="GET",
        roles=(Role.ADMIN, Role.AUDITOR),
        response_class=PlainTextResponse,
        operation_id="metrics",
        summary="Export Prometheus metrics.",
    )


def _probes(services: Services) -> Iterator[Route]:
    operations = Operations(services)
    get = partial(PlainRoute, method="GET")
    yield get(
        "/v1/openapi.json",
        OpenApi(services).document,
        roles=EVERY_ROLE,
        response_model=dict[str, Any],
        operation_id="openapi",
        summary="Give this document.",
    )
    yield get(
        "/.well-known/jwks.json",
        KeySet(services).respond,
        roles=ANYONE,
        response_model=JwkSet,
        operation_id="receipt_keys",
        summary="Give the public keys that receipts are signed with.",
    )
    yield get(
        "/health",
        operations.health,
        roles=ANYONE,
        response_model=ProbeStatus,
        operation_id="health",
        summary="Report whether the process lives.",
    )
    yield get(
        "/ready",
        operations.ready,
        roles=ANYONE,
        response_model=ProbeStatus,
        responses={"5XX": {"model": ProbeStatus, "description": "Not ready."}},
        operation_id="ready",
        summary="Report whether requests are served.",
    )
