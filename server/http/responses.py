"""Responses whose status is not 200, and the ones to requests that no route fits."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flexgate.server.http.auth import context_of
from flexgate.server.http.errors import ApiError

_NO_ROUTE: Final = {
    HTTPStatus.NOT_FOUND: ("There is nothing at this path.", "unknown_path"),
    HTTPStatus.METHOD_NOT_ALLOWED: ("This path does not support this method.", "method_not_allowed"),
}
OK: Final = int(HTTPStatus.OK)
CREATED: Final = int(HTTPStatus.CREATED)
ACCEPTED: Final = int(HTTPStatus.ACCEPTED)
_CLIENT_CLOSED_REQUEST: Final = 499


def disconnected(request: Request) -> Response:
    """499: the client left before there was a response. The log shows it."""
    context_of(request).disconnected = True
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


async def of_error(request: Request, error: Any) -> Response:
    """The one body of an `ApiError`."""
    context_of(request).error = error
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def of_http_error(request: Request, error: Any) -> Response:
    """What Starlette raises where no route fits, in the one body."""
    message, code = _NO_ROUTE.get(error.status_code, ("The request cannot be served.", "http_error"))
    headers = dict(error.headers or {})
    return await of_error(request, ApiError(message, status=error.status_code, code=code, headers=headers))
