"""`GET /v1/openapi.json`: this API, generated from the routes and the models of what they take and answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import copy
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi.openapi.utils import get_openapi
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from flexgate.server.http.auth import identify
from flexgate.server.http.body import Bodies
from flexgate.server.http.routes import Route


class OpenApi:
    """The route. Any key may read it; it says nothing about what the server holds."""

    def __init__(self, services: Bodies) -> None:
        self._services = services
        self._made: bytes | None = None

    async def document(self, request: Request) -> Response:
        """The document of the routes that are served where the request came in; made once, in a thread."""
        await identify(request, self._services)
        if self._made is None:
            self._made = await self._services.offload.run_for("", partial(_written, request.app.routes))
        return Response(self._made, media_type="application/json")


def described(routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """OpenAPI 3.1, of some routes. Each type's title is its name: generators call what they make by it."""
    whole = get_openapi(title="flexgate", version=version("flexgate"), routes=[_without_head(one) for one in routes])
    for name, schema in whole["components"]["schemas"].items():
        schema["title"] = name
    return whole


def _written(routes: Sequence[BaseRoute]) -> bytes:
    return json.dumps(described(routes), separators=(",", ":")).encode()


def _without_head(route: BaseRoute) -> BaseRoute:
    """The route without the method that every GET has beside it."""
    alone = copy(route)
    if isinstance(alone, Route):
        alone.methods = {alone.method}
    return alone
