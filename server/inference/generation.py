"""The generating routes: what happens between a request's preparation and the end of its response."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any, Final, TypeVar

from anyio import CancelScope
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flexgate.policies.ids import ExpertId
from flexgate.server.engine.frontend.calls import CURRENT_CALL
from flexgate.server.engine.seam.openai import ErrorResponse
from flexgate.server.http.connections import EventStream
from flexgate.server.http.errors import ApiError, Unavailable
from flexgate.server.http.offload import on_loop
from flexgate.server.http.responses import disconnected
from flexgate.server.inference import recording, response_metadata
from flexgate.server.inference.attribution import attribution_object, credits_of
from flexgate.server.inference.counterfactual import leave_one_out
from flexgate.server.inference.limits.limiter import COST, TOKENS, Amounts
from flexgate.server.inference.openai import sse, vllm_errors
from flexgate.server.inference.openai.adapted import Later
from flexgate.server.inference.openai.streaming import in_pieces
from flexgate.server.inference.pipeline import Endpoint, InferenceRequest, InferenceServices
from flexgate.server.inference.tracing import TracedRequest
from flexgate.server.ledger.entries import MICROSECONDS, RegisteredExpert, Registration
from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.exclusion import catalogue_of, marks_of

BYTES_OF_A_TOKEN: Final = 8

logger = logging.getLogger(__name__)
M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")


class Generation:
    """A generating route."""

    def __init__(self, services: InferenceServices, endpoint: Endpoint) -> None:
        self._services = services
        self._endpoint = endpoint

    async def respond(self, http: Request) -> Response:
        """Prepare a request, generate, and add the decision and the attribution."""
        tracing = self._services.tracing
        request = (
            InferenceRequest(http, self._services, self._endpoint)
            if tracing is None
            else TracedRequest(http, self._services, self._endpoint, tracing)
        )
        await request.prepare()
        try:
            register(request)
            begin(request)
            return Delivery(await self._generate(request), lambda: finish(request))
        except BaseException:
            finish(request)
            raise

    async def _generate(self, request: InferenceRequest) -> Response:
        token = CURRENT_CALL.set(request.call)
        try:
            result = await until_disconnect(request.http, self._start(request))
        except ApiError:
            raise
        except Exception as error:
            raise cause(request, _translate(error, request)) from error
        finally:
            CURRENT_CALL.reset(token)
        if result is None:
            return disconnected(request.http)
        if isinstance(result, ErrorResponse):
            raise cause(request, vllm_errors.from_response(result))
        if hasattr(result, "__aiter__"):
            return await self._streamed(request, result)
        return await self._whole(request, result)

    async def _start(self, request: InferenceRequest) -> Any:
        """vLLM's response, or its stream."""
        endpoint, handlers = self._endpoint, self._services.handlers
        id_ = endpoint.id_prefix + request.context.request_id.removeprefix("req_")
        fields = {**request.body, **endpoint.fixed, "request_id": id_}
        model = await self._services.offload.run(validated, endpoint.model, fields)
        result = await (endpoint.forced if request.forced else endpoint.handler)(handlers)(model)
        if request.passes and not isinstance(result, ErrorResponse):
            request.counterfactual = await leave_one_out(request)
        return result

    async def _whole(self, request: InferenceRequest, result: Any) -> Response:
        """A response that is not streamed; a long one is made, written and freed in a thread."""
        offload, about = self._services.offload, metadata(request)
        counted = headers(request)  # by the limiter, which is the loop's alone
        offload.arrived(offload.arrived_bytes() + response_bytes(request, request.call.tokens()), request.tenant)
        try:
            made = await offload.run(self._write, request, result, about, counted)
        except Exception as error:
            raise cause(request, _translate(error, request)) from error
        if isinstance(made, ErrorResponse):
            raise cause(request, vllm_errors.from_response(made))
        raise_if_ended(request)  # while it was made
        request.answered = request.completed = True
        return made

    async def _write(
        self, request: InferenceRequest, result: Any, about: dict[str, Any], counted: Mapping[str, str]
    ) -> Response | ErrorResponse:
        """Make a response; the engine's outputs end here, since freeing long ones takes as long as making them."""
        made = await result.take() if isinstance(result, Later) else result
        if isinstance(made, ErrorResponse):
            return made
        content = {**self._endpoint.content(request, made), "flexgate": about}
        response = self._endpoint.response(content, headers=counted)
        request.answer.update(response.body)
        return response

    async def _streamed(self, request: InferenceRequest, result: Any) -> Response:
        """A stream. The engine works while the request is registered; nothing is sent before it is."""
        stream = _Stream(self._services, self._endpoint, request, result)
        try:
            await recording.require_registered(request)
            return EventStream(stream, headers=headers(request))
        except BaseException:
            await stream.aclose()
            raise


class _Stream:
    """The events of a response, which are being made from the start; `aclose` must follow."""

    def __init__(self, services: InferenceServices, endpoint: Endpoint, request: InferenceRequest, result: Any) -> None:
        self._services = services
        self._request = request
        self._result = result
        self._read: AsyncGenerator[bytes, None] | None = None
        events, about = endpoint.stream(request, result), partial(response_bytes, request)
        token = CURRENT_CALL.set(request.call)
        try:
            self._begun = sse.Begun(in_pieces(events, services.offload, request.tenant, about))
        finally:
            CURRENT_CALL.reset(token)

    def __aiter__(self) -> AsyncIterator[bytes]:
        self._read = self._events()
        return self._read

    async def _events(self) -> AsyncGenerator[bytes, None]:
        CURRENT_CALL.set(self._request.call)
        try:
            async for event in self._begun.with_comments():
                sent = event.encode()
                await self._digest(sent)
                yield sent
            self._request.completed = not self._request.broken
        finally:
            CURRENT_CALL.set(None)

    async def _digest(self, sent: bytes) -> None:
        offload, update = self._services.offload, self._request.answer.update
        self._request.answered = True
        if offload.holds_up(len(sent)):
            await offload.run_for(self._request.tenant, partial(update, sent))
        else:
            update(sent)

    async def aclose(self) -> None:
        """Close all of it."""
        with CancelScope(shield=True):  # where a client left, whatever waits is cancelled again and again
            async with aclosing(self._result), aclosing(self._begun):
                if self._read is not None:
                    await self._read.aclose()


class Delivery(Response):
    """A response that calls `done` once it was sent or its client has disconnected."""

    def __init__(self, response: Response, done: Callable[[], None]) -> None:
        super().__init__()
        self._response = response
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await self._response(scope, receive, send)
        finally:
            self._done()


def validated(model: type[M], body: dict[str, Any]) -> M:
    """`body` as a request type of vLLM's; raises `ApiError` naming the field at fault."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise vllm_errors.from_exception(error, body) from None


def register(request: InferenceRequest) -> None:
    """Write down a request that may go to the engine, and have its engine requests wait for their marks.

    Raises:
        ApiError: the ledger cannot be written, and the request may not go unrecorded; or the server is stopping.
    """
    call, decision, experts, services = request.call, request.decision, request.snapshot.experts, request.services
    registration = Registration(
        request=decision.decision_id,
        registered_at=round(services.clock() * MICROSECONDS),
        tenant=decision.tenant_id,
        key_id=request.principal.key_id,
        endpoint=request.http.scope["path"],
        model=services.model_names[0],
        policy_version=decision.policy_version,
        weights_epoch=request.weights_epoch,
        experts=tuple(
            RegisteredExpert(
                ref.slot,
                ref.expert,
                experts[ExpertId(ref.expert)].owner,
                agreement=None if agreement is None else agreement.agreement_id,
                agreement_version=None if agreement is None else agreement.version,
                package=ref.package,
                duties_sha256=None if agreement is None else agreement.duties_sha256,
            )
            for ref, agreement in zip(call.experts, decision.agreements, strict=True)
        ),
        prompt_sha256=request.context.body_sha256,
        catalogue=catalogue_of(request.snapshot.grades),
        excluded=marks_of(experts, decision.allowed, (reason.expert for reason in decision.excluded)),
    )
    try:
        request.entry = services.ledger.register(registration)
    except LedgerError as error:
        recording.require_unrecorded(request, error)
        return
    call.record = partial(recording.record, request)


def begin(request: InferenceRequest) -> None:
    """Let the call be found, so that it can be ended; raises `ApiError` if it lost its right meanwhile."""
    request.services.client.begin(request.call)
    request.services.running.begin(request.right)
    raise_if_ended(request)


def raise_if_ended(request: InferenceRequest) -> None:
    """Raise the error of a call that was ended early."""
    ended = None if request.call.failed is None else vllm_errors.ended_early(request.call)
    if ended is not None:
        raise ended


def finish(request: InferenceRequest) -> None:
    """End the call, once nothing of its response is left to send."""
    services = request.services
    commit_usage(request)
    recording.end(request)
    services.running.end(request.call)
    services.client.end(request.call)
    services.samples.add(request.tenant, request.query, services.clock())


def commit_usage(request: InferenceRequest) -> None:
    """Commit what the call used, before its client reads the end and sends its next request."""
    on_loop(lambda: _commit(request))


def _commit(request: InferenceRequest) -> None:
    amounts = used_amounts(request)
    request.reservation.commit(amounts, served=amounts[TOKENS] > 0)


def used_amounts(request: InferenceRequest) -> Amounts:
    """What the call used so far, its passes included."""
    calls = (request.call, *request.scoring)
    amounts = {TOKENS: sum(call.tokens() for call in calls)}
    if request.price is not None:
        amounts[COST] = recording.cost_so_far(request)
    return amounts


def metadata(request: InferenceRequest) -> dict[str, Any]:
    """The `flexgate` object, once the engine is done with the call; commits its usage."""
    commit_usage(request)
    used = request.call.attribution()
    attribution = attribution_object(
        request.snapshot,
        request.decision,
        used.experts,
        used.cached_prompt_tokens,
        request.counterfactual,
        ungated=request.services.client.ungated,
    )
    return response_metadata.metadata(
        request.decision,
        weights_epoch=request.weights_epoch,
        explain=request.extension.explain,
        attribution=attribution,
        credits=credits_of(request.decision, used.experts),
        max_tokens=request.call.cut_to,
    )


def headers(request: InferenceRequest) -> dict[str, str]:
    """The `x-flexgate-*` and `x-ratelimit-*` headers."""
    return response_metadata.headers(request.decision, request.weights_epoch) | request.reservation.headers


def response_bytes(request: InferenceRequest, tokens: int) -> int:
    """Estimate the response's bytes for so many tokens, with the log-probabilities that were requested."""
    body = request.body
    requested = (body.get(name) for name in ("logprobs", "top_logprobs", "prompt_logprobs"))
    each = 1 + sum(int(one or 0) for one in requested) + len(body.get("logprob_token_ids") or ())
    return tokens * BYTES_OF_A_TOKEN * each


def cause(request: InferenceRequest, error: ApiError) -> ApiError:
    """The error that ends the call: `error`, unless its gate or its constraint is the real cause."""
    commit_usage(request)
    request.broken = True
    if not error.server_fault or request.services.client.errored:
        return error
    if ended := vllm_errors.ended_early(request.call):
        return ended
    if isinstance(error, Unavailable):  # no fault of the request's constraint
        return error
    return vllm_errors.not_generated(request.body) or error


async def until_disconnect(request: Request, work: Awaitable[T]) -> T | None:
    """The result of `work`, or None when the client disconnects first; `work` is cancelled then."""
    gone = asyncio.ensure_future(_disconnect(request))
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _translate(error: Exception, request: InferenceRequest) -> ApiError:
    translated = vllm_errors.from_exception(error, request.body)
    if translated.server_fault:
        logger.error("a handler failed", exc_info=error)
    return translated
