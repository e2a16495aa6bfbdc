"""`GET /v1/models`: the names this server answers to, without paths."""

from __future__ import annotations

from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flexgate.server.http.auth import Callers, identify
from flexgate.server.http.errors import NotFound
from flexgate.server.inference.request.limits import Limits


class ModelServices(Callers, Protocol):
    """What the model list is made from."""

    @property
    def model_names(self) -> tuple[str, ...]: ...
    @property
    def started(self) -> float: ...
    @property
    def limits(self) -> Limits: ...


class Models:
    """The two routes."""

    def __init__(self, services: ModelServices) -> None:
        self._services = services

    async def list(self, request: Request) -> Response:
        """Every name; names are aliases of one model."""
        await identify(request, self._services)
        cards = [self._card(name) for name in self._services.model_names]
        return JSONResponse({"object": "list", "data": cards})

    async def retrieve(self, request: Request) -> Response:
        """One name."""
        await identify(request, self._services)
        name = request.path_params["model"]
        if name not in self._services.model_names:
            has = ", ".join(self._services.model_names)
            raise NotFound(f"The model does not exist. This server has: {has}.", code="model_not_found", param="model")
        return JSONResponse(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": int(self._services.started),
            "owned_by": "flexgate",
            "max_model_len": self._services.limits.prompt_tokens,
        }
