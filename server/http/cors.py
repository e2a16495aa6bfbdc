"""Cross-origin requests: web pages may call the tenants' routes, and no other."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

_METHODS: Final = ("GET", "POST")


class TenantCors:
    """Let pages of the named origins call some routes. On the others a browser is given no permission."""

    def __init__(self, app: ASGIApp, *, origins: Collection[str], routes: Iterable[tuple[str, str]]) -> None:
        """`routes` are (method, path template)."""
        self._app = app
        self._cors = CORSMiddleware(
            app, allow_origins=list(origins), allow_methods=_METHODS, allow_headers=["*"], expose_headers=["*"]
        )
        self._routes = [(method, compile_path(path)[0]) for method, path in routes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the preflight request before it."""
        shared = scope["type"] == "http" and self._is_shared(_method(scope), scope["path"])
        await (self._cors if shared else self._app)(scope, receive, send)

    def _is_shared(self, method: str, path: str) -> bool:
        return any(method == known and pattern.match(path) for known, pattern in self._routes)


def _method(scope: Scope) -> str:
    """The method of a request, or the one that a preflight request asks about."""
    if scope["method"] == "OPTIONS":
        for name, value in scope["headers"]:
            if name == b"access-control-request-method":
                return str(value.decode("latin-1"))
    return str(scope["method"])
