"""A route that does not say who may use it is in no application: the start fails instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from flexgate.server.admin.operations import OPERATIONS, ROUTES
from flexgate.server.admin.router import OperationRoute, OperationRouter
from flexgate.server.http.routes import ANYONE, PlainRoute, UndeclaredRoute
from flexgate.server.lifecycle import app as module
from flexgate.server.lifecycle.app import build_app


async def endpoint(request: Request) -> Response:
    return Response("reached")


@pytest.mark.parametrize(
    "route",
    [Route("/v1/secret", endpoint), APIRoute("/v1/secret", endpoint), Mount("/v1/secret", routes=[])],
    ids=["Starlette", "FastAPI", "mount"],
)
def test_no_application_is_built_with_a_route_of_another_kind(
    services: Any, monkeypatch: pytest.MonkeyPatch, route: Any
) -> None:
    declared = module.routes

    def more(*arguments: Any) -> Iterator[Any]:
        yield from declared(*arguments)
        yield route

    monkeypatch.setattr(module, "routes", more)
    with pytest.raises(UndeclaredRoute, match="'/v1/secret': declare the roles"):
        build_app(services)


def test_a_route_cannot_be_made_without_roles() -> None:
    with pytest.raises(TypeError, match="roles"):
        PlainRoute("/v1/secret", endpoint, method="GET")  # type: ignore[call-arg]


def test_the_routers_of_the_administration_have_operations_alone() -> None:
    router = OperationRouter()
    router.get("/v1/secret")(endpoint)
    with pytest.raises(UndeclaredRoute, match="/v1/secret"):
        router.declared()


def test_open_routes_are_probes_and_public_keys(services: Any) -> None:
    routes: list[Any] = build_app(services).routes
    assert {route.path for route in routes if route.roles == ANYONE} == {"/.well-known/jwks.json", "/health", "/ready"}
    assert all(isinstance(route, OperationRoute) for route in ROUTES)
    assert len(OPERATIONS) == len(ROUTES) == len({(o.method, o.path) for o in OPERATIONS})
