"""`POST /tokenize` and `POST /detokenize`: the tokenizer only; no gate, because no expert."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flexgate.policies.ids import TenantId
from flexgate.server.engine.seam.openai import (
    DetokenizeRequest,
    ErrorResponse,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from flexgate.server.http.errors import ApiError
from flexgate.server.http.responses import client_gone
from flexgate.server.http.validation import read_request
from flexgate.server.inference.decide import Kind, honoured_body
from flexgate.server.inference.limits import refusals
from flexgate.server.inference.limits.limiter import REQUESTS
from flexgate.server.inference.limits.scopes import scopes_of
from flexgate.server.inference.openai import vllm_errors
from flexgate.server.inference.pipeline import (
    InferenceServices,
    check_chat_template,
    check_model,
    identify_tenant,
    until_gone,
)
from flexgate.server.inference.request import fields, limits

AT_ONCE: Final = 4  # per project and process

PROMPT = Kind("tokenize", fields.TOKENIZE_PROMPT, limits.check_tokenize)
CHAT = Kind("tokenize", fields.TOKENIZE_CHAT, limits.check_tokenize)
DETOKENIZE = Kind("detokenize", fields.DETOKENIZE, limits.check_detokenize)


class Tokenization:
    """The two routes. One thread makes tokens for everybody: a tenant may not fill what waits for it."""

    def __init__(self, services: InferenceServices) -> None:
        self._services = services
        self._running: Counter[TenantId] = Counter()

    async def tokenize(self, request: Request) -> Response:
        """Text or messages as token ids."""
        return await self._answer(request, self._tokenize)

    async def detokenize(self, request: Request) -> Response:
        """Token ids as text."""
        return await self._answer(request, self._detokenize)

    def _tokenize(self, raw: dict[str, Any]) -> Work:
        chat = raw.get("messages") is not None
        body = self._body(CHAT if chat else PROMPT, raw)
        if chat:
            check_chat_template(self._services)
        model = TokenizeChatRequest if chat else TokenizeCompletionRequest
        return Work(body, model, self._services.handlers.tokenization.create_tokenize)

    def _detokenize(self, raw: dict[str, Any]) -> Work:
        body = self._body(DETOKENIZE, raw)
        return Work(body, DetokenizeRequest, self._services.handlers.tokenization.create_detokenize)

    def _body(self, kind: Kind, raw: dict[str, Any]) -> dict[str, Any]:
        body = honoured_body(kind, raw, self._services.limits)
        check_model(body, self._services)
        return body

    async def _answer(self, request: Request, prepare: Callable[[dict[str, Any]], Work]) -> Response:
        services = self._services
        tenant, principal, snapshot = await identify_tenant(request, services)
        raw = await read_request(request, services)
        work = await services.offload.run(prepare, raw)
        with self._place(tenant):
            reservation = services.limiter.reserve(scopes_of(snapshot.tenants[tenant], principal.key_id), {REQUESTS: 1})
            try:
                result = await until_gone(request, services.offload.run_async(work.run))
            finally:
                reservation.commit({})
        if result is None:
            return client_gone()
        return await services.offload.run(JSONResponse, result, headers=reservation.headers)

    @contextmanager
    def _place(self, tenant: TenantId) -> Iterator[None]:
        if self._running[tenant] >= AT_ONCE:
            raise refusals.too_many_tokenizing(AT_ONCE)
        self._running[tenant] += 1
        try:
            yield
        finally:
            self._running[tenant] -= 1


@dataclass(frozen=True, slots=True)
class Work:
    """What a handler of vLLM's is asked."""

    body: dict[str, Any]
    model: type[BaseModel]
    handler: Callable[[Any, Any], Awaitable[Any]]

    async def run(self) -> dict[str, Any]:
        """Its answer; raises `ApiError`."""
        try:
            result = await self.handler(self.model.model_validate(self.body), None)
        except ApiError:
            raise
        except Exception as error:
            raise vllm_errors.from_exception(error, self.body) from error
        if isinstance(result, ErrorResponse):
            raise vllm_errors.from_response(result)
        answer: dict[str, Any] = result.model_dump()
        return answer
