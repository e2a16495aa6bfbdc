"""Responses against the OpenAPI document: of every route and status, the schema that its body must have."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import httpx
from jsonschema.validators import Draft202012Validator

from flexgate.server.http.auth import EVERY_ROLE
from flexgate.server.http.routes import Route
from flexgate.server.lifecycle.app import document, routes
from flexgate.server.lifecycle.services import Services

Place = tuple[str, str]


@cache
def described() -> dict[str, Any]:
    """The document, made once."""
    return document()


@cache
def _routes() -> tuple[Route, ...]:
    return tuple(routes(cast(Services, None), EVERY_ROLE))


def place_of(request: httpx.Request) -> Place | None:
    """Method and path template of a request, if there is such a route."""
    for route in _routes():
        if request.method in route.methods and route.path_regex.match(request.url.path):
            return route.method, route.path_format
    return None


def conform(response: httpx.Response) -> str:
    """The status as it is described; raises `AssertionError` for a response that is not described, or not so."""
    place = place_of(response.request)
    assert place is not None, f"no route: {response.request.url}"
    method, path = place
    declared = described()["paths"][path][method.lower()]["responses"]
    status = next((s for s in (str(response.status_code), f"{response.status_code // 100}XX") if s in declared), None)
    assert status is not None, f"{method} {path} does not describe {response.status_code}"
    media = response.headers.get("content-type", "").partition(";")[0]
    assert media in declared[status]["content"], f"{method} {path} {status} does not describe {media}"
    if media == "application/json":
        mistakes = list(_validator(method, path, status).iter_errors(response.json()))
        assert not mistakes, f"{method} {path} {status}: {[f'{e.json_path}: {e.message}' for e in mistakes]}"
    return status


@cache
def _validator(method: str, path: str, status: str) -> Draft202012Validator:
    content = described()["paths"][path][method.lower()]["responses"][status]["content"]
    return Draft202012Validator({**content["application/json"]["schema"], "components": described()["components"]})
