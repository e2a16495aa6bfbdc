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
from flexgate.server.http.responses import disconnected
from flexgate.server.inference.generation import until_disconnect
from flexgate.server.inference.limits import refusals
from flexgate.server.inference.limits.limiter import REQUESTS
from flexgate.server.inference.openai import vllm_errors
from flexgate.server.inference.pipeline import (
    Body,
    InferenceServices,
    TenantRequest,
    check_chat_template,
    check_model,
    honoured_body,
)
from flexgate.server.inference.request import fields
from flexgate.server.inference.request.limits import Limits, check_flags
from flexgate.server.inference.request.messages import check_conversation, check_length
from flexgate.server.inference.request.values import Table, invalid, sized

AT_ONCE: Final = 4  # per project and process


class Tokenization:
    """The two routes. One thread tokenizes for all tenants, so that each may have only `AT_ONCE` requests at it."""

    def __init__(self, services: InferenceServices) -> None:
        self._services = services
        self._running: Counter[TenantId] = Counter()

    async def tokenize(self, request: Request) -> Response:
        """Text or messages as token ids."""
        return await self._respond(request, self._tokenize)

    async def detokenize(self, request: Request) -> Response:
        """Token ids as text."""
        return await self._respond(request, self._detokenize)

    def _tokenize(self, raw: Body) -> Work:
        chat = raw.get("messages") is not None
        table = fields.TOKENIZE_CHAT if chat else fields.TOKENIZE_PROMPT
        body = self._body(raw, table, _check_tokenize)
        if chat:
            check_chat_template(self._services)
        model = TokenizeChatRequest if chat else TokenizeCompletionRequest
        return Work(body, model, self._services.handlers.tokenization.create_tokenize)

    def _detokenize(self, raw: Body) -> Work:
        body = self._body(raw, fields.DETOKENIZE, _check_detokenize)
        return Work(body, DetokenizeRequest, self._services.handlers.tokenization.create_detokenize)

    def _body(self, raw: Body, table: Table, check: Callable[[Body, Limits], None]) -> Body:
        body = honoured_body(raw, table, check, self._services.limits)
        check_model(body, self._services)
        return body

    async def _respond(self, http: Request, validate: Callable[[Body], Work]) -> Response:
        services, request = self._services, TenantRequest(http, self._services)
        await request.authenticate()
        await request.read()
        work = await services.offload.run(validate, request.raw)
        del request.raw
        await request.judge()
        with self._place(request.tenant):
            reservation = services.limiter.reserve(request.scopes, {REQUESTS: 1})
            try:
                result = await until_disconnect(http, services.offload.run(work.run))
            finally:
                reservation.commit({})
        if result is None:
            return disconnected(http)
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
    """One call of a handler of vLLM's."""

    body: Body
    model: type[BaseModel]
    handler: Callable[[Any, Any], Awaitable[Any]]

    async def run(self) -> dict[str, Any]:
        """Its response; raises `ApiError`."""
        try:
            result = await self.handler(self.model.model_validate(self.body), None)
        except ApiError:
            raise
        except Exception as error:
            raise vllm_errors.from_exception(error, self.body) from error
        if isinstance(result, ErrorResponse):
            raise vllm_errors.from_response(result)
        content: dict[str, Any] = result.model_dump()
        return content


def _check_tokenize(body: Body, limits: Limits) -> None:
    """Refuse a tokenize request over its limits, or with something to fetch."""
    check_flags(body)
    if "messages" in body:
        check_conversation(body, limits, measure=True)
    elif not isinstance(body.get("prompt"), str):
        invalid("'prompt' must be a string.", "prompt")
    else:
        check_length("prompt", limits, body["prompt"])


def _check_detokenize(body: Body, limits: Limits) -> None:
    """Refuse tokens that are no list, or more than the model can hold."""
    if not isinstance(body.get("tokens"), list):
        invalid("'tokens' must be a list of token ids.", "tokens")
    sized(body, "tokens", most=limits.prompt_tokens)
