"""The path of a generating request, the same for chat, completions and responses."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from flexgate.policies.cache import DecisionCache
from flexgate.policies.decision import Decision
from flexgate.policies.ids import TenantId
from flexgate.policies.snapshot import Snapshot
from flexgate.server.engine.frontend.calls import CURRENT_CALL, AllowedSlots, GatedCall
from flexgate.server.engine.seam.openai import ErrorResponse
from flexgate.server.http.auth import AuthError, Principal, require_tenant
from flexgate.server.http.connections import EventStream
from flexgate.server.http.context import context_of, identify
from flexgate.server.http.errors import ApiError, Invalid, NotFound, Unavailable
from flexgate.server.http.offload import on_loop
from flexgate.server.http.refusals import from_auth
from flexgate.server.http.responses import client_gone
from flexgate.server.http.validation import Bodies, read_request
from flexgate.server.inference import response_metadata
from flexgate.server.inference.attribution import attribution_object
from flexgate.server.inference.decide import Admitted, Kind, admit, honoured_body
from flexgate.server.inference.enforcement import Right, RunningRequests
from flexgate.server.inference.fair_queue import FairQueue
from flexgate.server.inference.limits.limiter import REQUESTS, TOKENS, Limiter, Reservation
from flexgate.server.inference.limits.scopes import scopes_of, stated_tokens
from flexgate.server.inference.openai import sse, vllm_errors
from flexgate.server.inference.openai.foreign import Answer
from flexgate.server.inference.openai.making import Later
from flexgate.server.inference.openai.streaming import in_pieces
from flexgate.server.inference.request.limits import Limits
from flexgate.server.policy.decision_samples import DecisionSamples

if TYPE_CHECKING:
    from flexgate.server.engine.frontend.client import GatedEngineClient
    from flexgate.server.inference.openai.handlers import Handlers


BYTES_OF_A_TOKEN: Final = 8

logger = logging.getLogger(__name__)
T = TypeVar("T")


class InferenceServices(Bodies, Protocol):
    """What requests for inference work with."""

    @property
    def client(self) -> GatedEngineClient: ...
    @property
    def handlers(self) -> Handlers: ...
    @property
    def decisions(self) -> DecisionCache: ...
    @property
    def samples(self) -> DecisionSamples: ...
    @property
    def limits(self) -> Limits: ...
    @property
    def limiter(self) -> Limiter: ...
    @property
    def running(self) -> RunningRequests: ...
    @property
    def queue(self) -> FairQueue: ...
    @property
    def model_names(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class Run:
    """One admitted request on its way through a handler."""

    services: InferenceServices
    admitted: Admitted
    right: Right
    weights_epoch: int
    request_id: str
    reservation: Reservation

    @property
    def call(self) -> GatedCall:
        """What the engine is asked for."""
        return self.right.call

    def begin(self) -> None:
        """Let the call be seen by whatever may end it; raises `ApiError` where its right has gone meanwhile."""
        self.services.client.begin(self.call)
        self.services.running.begin(self.right)
        ended = vllm_errors.ended_early(self.call)
        if ended is not None:
            raise ended

    def finish(self) -> None:
        """End the call, once nothing of its answer is left to send."""
        self._commit()
        self.services.running.end(self.call)
        self.services.client.end(self.call)

    def _commit(self) -> None:
        """Commit what the call used, before the client reads the end: its next request follows at once."""
        on_loop(lambda: self.reservation.commit({TOKENS: self.call.tokens()}))

    def answer_object(self) -> dict[str, Any]:
        """The `flexgate` object, once the engine is done with the call, whose usage is committed."""
        self._commit()
        used = self.call.attribution()
        attribution = attribution_object(
            self.admitted.snapshot, self.admitted.decision, used.experts, used.cached_prompt_tokens
        )
        return response_metadata.answer_object(
            self.admitted.decision,
            weights_epoch=self.weights_epoch,
            explain=self.admitted.explain,
            attribution=attribution,
        )

    def answer_bytes(self, tokens: int) -> int:
        """About how large the answer is for so many tokens, with the log-probabilities that were asked for."""
        body = self.admitted.body
        asked = (body.get(name) for name in ("logprobs", "top_logprobs", "prompt_logprobs"))
        each = 1 + sum(int(one or 0) for one in asked) + len(body.get("logprob_token_ids") or ())
        return tokens * BYTES_OF_A_TOKEN * each

    def headers(self) -> dict[str, str]:
        """The `x-flexgate-*` and `x-ratelimit-*` headers."""
        return response_metadata.headers(self.admitted.decision, self.weights_epoch) | self.reservation.headers

    def error(self, error: ApiError) -> ApiError:
        """The error that ends the call: `error`, unless its gate or its constraint is the real cause."""
        self._commit()
        if not error.server_fault or self.services.client.errored:
            return error
        refused = vllm_errors.ended_early(self.call)
        return refused or vllm_errors.not_generated(self.admitted.body) or error


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What differs between the generating endpoints.

    `start` gives vLLM's answer, or its stream; `plain` and `stream` turn those into ours, `response` writes the first.
    """

    kind: Kind
    needs_chat_template: bool
    start: Callable[[Run], Awaitable[Any]]
    plain: Callable[[Run, Any], dict[str, Any]]
    stream: Callable[[Run, Any], AsyncGenerator[str, None]]
    response: type[JSONResponse] = Answer


class Generation:
    """A generating route."""

    def __init__(self, services: InferenceServices, endpoint: Endpoint) -> None:
        self._services = services
        self._endpoint = endpoint

    async def answer(self, request: Request) -> Response:
        """Authenticate, admit, generate, report."""
        run = await self._admit(request)
        try:
            run.begin()
            return Delivery(await self._generate(request, run), run.finish)
        except BaseException:
            run.finish()
            raise

    async def _generate(self, request: Request, run: Run) -> Response:
        token = CURRENT_CALL.set(run.call)
        try:
            result = await until_gone(request, self._endpoint.start(run))
        except ApiError:
            raise
        except Exception as error:
            raise run.error(_translate(error, run.admitted.body)) from error
        finally:
            CURRENT_CALL.reset(token)
        if result is None:
            return client_gone()
        if isinstance(result, ErrorResponse):
            raise run.error(vllm_errors.from_response(result))
        if hasattr(result, "__aiter__"):
            return EventStream(self._events(run, result), headers=run.headers())
        return await self._plain(run, result)

    async def _plain(self, run: Run, result: Any) -> Response:
        """An answer that is not streamed, made where its size belongs."""
        offload, about = self._services.offload, run.answer_object()
        offload.arrived(offload.arrived_bytes() + run.answer_bytes(run.call.tokens()), run.right.tenant)
        try:
            made = await offload.run_async(result.make) if isinstance(result, Later) else result
        except Exception as error:
            raise run.error(_translate(error, run.admitted.body)) from error
        if isinstance(made, ErrorResponse):
            raise run.error(vllm_errors.from_response(made))
        response = await offload.run(self._write, run, made, about)
        ended = vllm_errors.ended_early(run.call)
        if ended is not None:  # while it was made
            raise ended
        return response

    def _write(self, run: Run, made: Any, about: dict[str, Any]) -> Response:
        return self._endpoint.response({**self._endpoint.plain(run, made), "flexgate": about}, headers=run.headers())

    async def _admit(self, request: Request) -> Run:
        services = self._services
        context = context_of(request)
        tenant, principal, known_by = await identify_tenant(request, services)
        raw = await read_request(request, services)
        body = await services.offload.run(honoured_body, self._endpoint.kind, raw, services.limits)
        check_model(body, services)
        if self._endpoint.needs_chat_template:
            check_chat_template(services)
        admitted = await admit(
            body,
            tenant=tenant,
            decision_id=f"dec_{uuid.uuid4().hex}",
            policy=services.policy,
            cache=services.decisions,
            samples=services.samples,
            now=services.clock(),
        )
        decision = admitted.decision
        context.noted |= {
            "decision": decision.decision_id,
            "policy_version": decision.policy_version,
        }
        allowed, epoch = allowed_slots(decision, services), services.client.weights_epoch
        scopes = scopes_of(admitted.snapshot.tenants[tenant], principal.key_id)
        reservation = services.limiter.reserve(scopes, {REQUESTS: 1, TOKENS: stated_tokens(body)})
        call = GatedCall(
            allowed,
            admitted.client_salt,
            reserve=lambda tokens: reservation.raise_to({TOKENS: tokens}),
            queue=lambda choices, tokens: services.queue.enter(tenant, choices, tokens),
            confirmed=services.policy.fresh,
        )
        version = min(known_by.policy_version, admitted.snapshot.policy_version)
        right = Right(call, principal, tenant, admitted.request, version)
        return Run(services, admitted, right, epoch, context.request_id.removeprefix("req_"), reservation)

    async def _events(self, run: Run, result: Any) -> AsyncIterator[str]:
        CURRENT_CALL.set(run.call)
        events = self._endpoint.stream(run, result)
        made = in_pieces(events, self._services.offload, run.right.tenant, run.answer_bytes)
        try:
            async for event in sse.with_comments(made):
                yield event
        finally:
            CURRENT_CALL.set(None)
            await made.aclose()
            await result.aclose()


class Delivery(Response):
    """A response that tells when the last of it was sent, or nobody is left to send it to."""

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


async def identify_tenant(request: Request, services: InferenceServices) -> tuple[TenantId, Principal, Snapshot]:
    """Who asks, by which key, and the snapshot that knows both; raises `ApiError`."""
    principal, snapshot = await identify(request, services)
    try:
        return require_tenant(principal), principal, snapshot
    except AuthError as error:
        raise from_auth(error) from error


def allowed_slots(decision: Decision, services: InferenceServices) -> AllowedSlots:
    """The decision in the engine's terms; raises `ApiError` when an expert has just gone."""
    refs = [services.client.ref(expert) for expert in decision.allowed]
    held = tuple(ref for ref in refs if ref is not None)
    if len(held) != len(refs):
        raise Unavailable("An expert of this request is being replaced or revoked. Try again.", code="experts_changing")
    return AllowedSlots(decision.tenant_id, held, decision.valid_until)


def check_model(body: Mapping[str, Any], services: InferenceServices) -> None:
    """Refuse a model that is none of this server's names."""
    model = body.get("model")
    if model is not None and model not in services.model_names:
        raise NotFound(
            f"The model does not exist. This server has: {', '.join(services.model_names)}.",
            code="model_not_found",
            param="model",
        )


def check_chat_template(services: InferenceServices) -> None:
    """Refuse chat on a checkpoint that cannot chat."""
    if not services.handlers.has_chat_template:
        raise Invalid(
            "The served checkpoint has no chat template. "
            "Start the server with --chat-template, or use /v1/completions.",
            param=None,
            code="no_chat_template",
        )


async def until_gone(request: Request, work: Awaitable[T]) -> T | None:
    """The result of `work`, or None when the client leaves first; `work` is cancelled then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _translate(error: Exception, body: dict[str, Any]) -> ApiError:
    translated = vllm_errors.from_exception(error, body)
    if translated.server_fault:
        logger.error("a handler failed", exc_info=error)
    return translated
