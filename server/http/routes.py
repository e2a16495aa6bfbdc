"""Routes that say who may use them: FastAPI's, described by what is checked and what they respond with.

An application is made of these alone (`require_declared`): what has no declared roles is not served.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from typing import Any, Final

from fastapi import Depends
from fastapi.params import Body
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from fastapi.utils import create_model_field
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from flexgate.policies.documents import Role
from flexgate.server.http.responses import OK
from flexgate.server.http.schemas import ErrorBody

Json = dict[str, Any]
ANYONE: Final[frozenset[Role]] = frozenset()
"""For routes that need no key."""
BEARER: Final = Depends(HTTPBearer(scheme_name="key", auto_error=False))
"""Describes how a key is sent; `flexgate.server.http.auth.identify` reads it."""


class UndeclaredRoute(Exception):
    """A route does not say who may use it."""


class Route(APIRoute):
    """A route with the roles that may use it, and the models of its body, query and response."""

    def __init__(
        self,
        path: str,
        endpoint: Callable[..., Awaitable[Response]],
        *,
        method: str,
        roles: Collection[Role],
        status: int = OK,
        body: type[BaseModel] | None = None,
        query: type[BaseModel] | None = None,
        events: type[BaseModel] | None = None,
        responses: dict[int | str, Json] | None = None,
        **described: Any,
    ) -> None:
        """`body` and `query` are described here, and read by the endpoint, within limits and after its caller is known.

        `events` are those of its streamed response; `described` is what `fastapi.routing.APIRoute` takes.
        """
        refused = _REFUSED_BESIDE_TEXT if "response_class" in described else _REFUSED
        super().__init__(
            path,
            endpoint,
            methods=[method],
            status_code=status,
            dependencies=[] if roles is ANYONE else [BEARER],
            responses={"4XX": refused, "5XX": refused, **_streamed(status, events), **(responses or {})},
            response_description="Done.",
            openapi_extra={"parameters": [*_path_parameters(path), *_query_parameters(query)]},
            **described,
        )
        self.method = method
        self.roles = frozenset(roles)
        if body is not None:
            self.body_field = create_model_field("body", body, field_info=Body(annotation=body))
        if events is not None:
            self.stream_item_field = create_model_field("event", events, mode="serialization")
        if method == "GET":
            self.methods.add("HEAD")


class PlainRoute(Route):
    """A route whose endpoint takes the request, and has no dependencies to be solved."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """The endpoint itself."""
        endpoint: Callable[[Request], Any] = self.endpoint
        return endpoint


def require_declared(routes: Iterable[BaseRoute], kind: type[Route] = Route) -> None:
    """Raise `UndeclaredRoute` for a route that is not of a kind which declares its roles."""
    for route in routes:
        if not isinstance(route, kind):
            raise UndeclaredRoute(f"route '{getattr(route, 'path', route)}': declare the roles that may use it")


_REFUSED: Final[Json] = {"model": ErrorBody, "description": "Refused."}
_REFUSED_BESIDE_TEXT: Final[Json] = {
    "description": "Refused.",
    "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{ErrorBody.__name__}"}}},
}
"""For a route that responds with no JSON: FastAPI would describe its errors as of the same kind."""


def _streamed(status: int, events: type[BaseModel] | None) -> dict[int | str, Json]:
    if events is None:
        return {}
    return {status: {"content": {"text/event-stream": {"schema": {"$ref": f"#/components/schemas/{events.__name__}"}}}}}


def _path_parameters(path: str) -> Iterator[Json]:
    for name in re.findall(r"{(\w+)(?::path)?}", path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _query_parameters(model: type[BaseModel] | None) -> Iterator[Json]:
    """As OpenAI's clients write them: `name=v`, `names[]=v&names[]=w`, `range[gte]=1`."""
    schema = {} if model is None else model.model_json_schema()
    for name, of in schema.get("properties", {}).items():
        nested = of.get("$ref")
        many = any(option.get("type") == "array" for option in (of, *of.get("anyOf", ())))
        yield {
            "name": f"{name}[]" if many else name,
            "in": "query",
            "required": name in schema.get("required", ()),
            "schema": schema["$defs"][nested.rpartition("/")[2]] if nested else of,
            **({"style": "deepObject", "explode": True} if nested else {}),
        }
