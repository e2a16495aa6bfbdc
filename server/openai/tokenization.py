"""`POST /tokenize` and `POST /detokenize`: the tokenizer only; no gate, because no expert."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.tokenize.protocol import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)

from flexgate.server.admission import Kind, honoured_body
from flexgate.server.auth import AuthError, require_tenant
from flexgate.server.context import identify
from flexgate.server.errors import ApiError
from flexgate.server.openai import fields, limits, vllm_errors
from flexgate.server.openai.generation import check_chat_template, check_model, read_request
from flexgate.server.refusals import from_auth
from flexgate.server.services import Services

PROMPT = Kind("tokenize", fields.TOKENIZE_PROMPT, limits.check_tokenize)
CHAT = Kind("tokenize", fields.TOKENIZE_CHAT, limits.check_tokenize)
DETOKENIZE = Kind("detokenize", fields.DETOKENIZE, limits.check_detokenize)


class Tokenization:
    """The two routes."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def tokenize(self, request: Request) -> Response:
        """Text or messages as token ids."""
        raw = await self._read(request)
        chat = raw.get("messages") is not None
        body = self._body(CHAT if chat else PROMPT, raw)
        if chat:
            check_chat_template(self._services)
        model = TokenizeChatRequest if chat else TokenizeCompletionRequest
        return await self._run(body, model, self._services.handlers.tokenization.create_tokenize)

    async def detokenize(self, request: Request) -> Response:
        """Token ids as text."""
        body = self._body(DETOKENIZE, await self._read(request))
        handler = self._services.handlers.tokenization.create_detokenize
        return await self._run(body, DetokenizeRequest, handler)

    async def _read(self, request: Request) -> dict[str, Any]:
        principal, _ = await identify(request, self._services)
        try:
            require_tenant(principal)
        except AuthError as error:
            raise from_auth(error) from error
        return await read_request(request, self._services)

    def _body(self, kind: Kind, raw: dict[str, Any]) -> dict[str, Any]:
        body = honoured_body(kind, raw, self._services.limits)
        check_model(body, self._services)
        return body

    async def _run(
        self,
        body: dict[str, Any],
        model: type[BaseModel],
        handler: Callable[[Any, Any], Awaitable[Any]],
    ) -> Response:
        try:
            result = await handler(model.model_validate(body), None)
        except ApiError:
            raise
        except Exception as error:
            raise vllm_errors.from_exception(error, body) from error
        if isinstance(result, ErrorResponse):
            raise vllm_errors.from_response(result)
        return JSONResponse(result.model_dump())
