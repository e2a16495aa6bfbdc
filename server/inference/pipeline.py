"""A request for inference, from its key to what it may use of the engine, in five steps.

    authenticate   its key; nothing more is read of a request without one
    read           the body, within bytes and seconds
    validate       its honoured fields, within limits
    decide         by one snapshot of the policy: its key again, its experts, and until when
    reserve        requests, tokens, concurrency and budget of its project and its key

A step refuses by raising `ApiError`. What it finds out becomes a field of the request, and a field does not exist
before its step, so that none can be left out. What follows is in `flexgate.server.inference.generation`.
"""

from __future__ import annotations

import hashlib
import math
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse

from flexgate.policies.cache import DecisionCache
from flexgate.policies.decision import Decision, DecisionRequest
from flexgate.policies.errors import LayerWithoutExpert, PolicyError, VersionNotReached
from flexgate.policies.ids import TenantId
from flexgate.policies.reasons import LAYER_WITHOUT_EXPERT
from flexgate.policies.snapshot import Snapshot
from flexgate.server.engine.frontend.calls import ExpertSlotRef, GatedCall, bitmask_of
from flexgate.server.http.auth import Context, Principal, context_of, identify, recognise, require_tenant
from flexgate.server.http.body import Bodies, read_request
from flexgate.server.http.errors import Invalid, NotFound, Unavailable
from flexgate.server.http.refusals import from_policy
from flexgate.server.inference.counterfactual import Counterfactual, Pass, passes_of
from flexgate.server.inference.enforcement import Right, RunningRequests
from flexgate.server.inference.fair_queue import FairQueue
from flexgate.server.inference.limits.cost import Price, price_of
from flexgate.server.inference.limits.limiter import (
    COST,
    REQUESTS,
    TOKENS,
    Limiter,
    LimitScope,
    Reservation,
    limit_cost,
    scopes_of,
    stated_length,
    stated_tokens,
)
from flexgate.server.inference.openai.foreign import LeanResponse
from flexgate.server.inference.request.extension import COUNTERFACTUAL, FIELD, Extension, parse_extension
from flexgate.server.inference.request.limits import Limits
from flexgate.server.inference.request.messages import forces_a_call
from flexgate.server.inference.request.values import Table, keep_honoured
from flexgate.server.ledger.errors import LedgerFailure
from flexgate.server.ledger.journal import Entry, Journal
from flexgate.server.policy.decision_samples import DecisionSamples

if TYPE_CHECKING:
    from flexgate.server.engine.frontend.client import GatedEngineClient
    from flexgate.server.http.tracing import Tracing
    from flexgate.server.inference.openai.handlers import Handlers

CACHE_SALT: Final = "cache_salt"
MAX_GATES: Final = 4_096
"""Sets of experts whose slots are remembered."""
MAX_SHOWN: Final = 256
"""Characters of an unknown model's name that a refusal repeats it with."""
Body = dict[str, Any]
Handler = Callable[[Any], Awaitable[Any]]
"""Gives vLLM's response to a request of its type, or its stream."""


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
    def ledger(self) -> Journal: ...
    @property
    def ledger_failure(self) -> LedgerFailure: ...
    @property
    def running(self) -> RunningRequests: ...
    @property
    def queue(self) -> FairQueue: ...
    @property
    def model_names(self) -> tuple[str, ...]: ...
    @property
    def tracing(self) -> Tracing | None: ...


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What differs between the generating endpoints.

    Attributes:
        table: what becomes of each field of a body.
        check: refuses honoured fields over a limit, and brings them into one form.
        model: vLLM's type of a request; it gets the body, what is `fixed`, and our id behind `id_prefix`.
        handler, forced: what generates the response, and what does where it must call a tool.
        content: vLLM's response as the body of ours.
        stream: vLLM's stream as the events of ours.
        response: writes `content`.
    """

    table: Table
    check: Callable[[Body, Limits], None]
    needs_chat_template: bool
    model: type[BaseModel]
    handler: Callable[[Handlers], Handler]
    forced: Callable[[Handlers], Handler]
    content: Callable[[InferenceRequest, Any], Body]
    stream: Callable[[InferenceRequest, Any], AsyncGenerator[str, None]]
    id_prefix: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    response: type[JSONResponse] = LeanResponse


class TenantRequest:
    """A request with a tenant's key.

    Attributes:
        context: for the log.
        principal: the caller, from `judge` on as the snapshot knows it.
        raw: the body as it was sent, until it is validated: what is ignored may be large.
        snapshot: the policy that the request lives on.
    """

    context: Context
    principal: Principal
    tenant: TenantId
    raw: Body
    snapshot: Snapshot

    def __init__(self, http: Request, services: InferenceServices) -> None:
        self.http = http
        self.services = services

    async def authenticate(self) -> None:
        """Refuse a request without a tenant's key; `judge` judges the key again, by the snapshot that it takes."""
        self.context = context_of(self.http)
        self.principal, _ = await identify(self.http, self.services)
        require_tenant(self.principal)

    async def read(self) -> None:
        """Read the body, a JSON object."""
        self.raw = await read_request(self.http, self.services)

    async def judge(self, least_version: int | None = None) -> float:
        """Take the snapshot that the request lives on, of at least a version, and judge its key by it.

        The body came since `authenticate`, which may have taken long. Returns the time in Unix seconds.
        """
        policy = self.services.policy
        try:
            self.snapshot = await (policy.current() if least_version is None else policy.at_least(least_version))
        except VersionNotReached as error:
            raise Unavailable(
                f"'flexgate.min_policy_version' asks for policy version {least_version}, and this server has "
                f"version {error.current}. Try again, or ask for a lower version.",
                code="policy_version_not_reached",
                param="flexgate.min_policy_version",
            ) from error
        except PolicyError as error:
            raise from_policy(error) from error
        now = self.services.clock()
        self.principal = recognise(self.snapshot, self.principal.digest, now, self.context.roles)
        self.context.principal = self.principal
        self.tenant = require_tenant(self.principal)
        return now

    @property
    def scopes(self) -> tuple[LimitScope, LimitScope]:
        """The limits that it counts against: its project's and its key's."""
        return scopes_of(self.snapshot.tenants[self.tenant], self.principal.key_id)


class InferenceRequest(TenantRequest):
    """A request to generate.

    Attributes:
        body: honoured fields alone, without ours and the salt, so that no handler sees what was refused or ignored.
        extension: the `flexgate` field: request filter, purpose, region.
        forced: whether the response must call a tool.
        query: the decision's input.
        experts: those that it may use, with their slots.
        weights_epoch: of the experts that the gate names.
        call: the request as the engine sees it.
        right: the rights that it depends on while it runs.
        entry: the request in the ledger, once it is there.
        price: what its agreements ask for, where a budget of money limits it.
        passes: what its response is scored under at most, for `counterfactual`.
        scoring: the calls of these passes.
        counterfactual: what leaving each expert out changes, where that was asked for.
        answer: SHA-256 of the response's body, as far as it was sent.
        answered: whether any of it was given to be sent; an error that is sent instead is no answer.
        completed: whether all of its response was generated.
        broken: whether an error ended its response.
    """

    body: Body
    extension: Extension
    client_salt: str | None
    forced: bool
    query: DecisionRequest
    decision: Decision
    experts: tuple[ExpertSlotRef, ...]
    weights_epoch: int
    reservation: Reservation
    call: GatedCall
    right: Right
    entry: Entry | None = None
    price: Price | None = None
    passes: tuple[Pass, ...] = ()
    scoring: Sequence[GatedCall] = ()
    counterfactual: Counterfactual | None = None
    answered: bool = False
    completed: bool = False
    broken: bool = False

    def __init__(self, http: Request, services: InferenceServices, endpoint: Endpoint) -> None:
        super().__init__(http, services)
        self.endpoint = endpoint
        self.answer = hashlib.sha256()

    async def prepare(self) -> None:
        """Take the five steps."""
        await self.authenticate()
        await self.read()
        await self.validate()
        await self.decide()
        self.reserve()

    async def validate(self) -> None:
        """Keep honoured fields within limits; refuse unknown ones by name."""
        endpoint, services = self.endpoint, self.services
        body = await services.offload.run(honoured_body, self.raw, endpoint.table, endpoint.check, services.limits)
        del self.raw
        check_model(body, services)
        if endpoint.needs_chat_template:
            check_chat_template(services)
        self.forced = forces_a_call(body)
        self.extension = body.pop(FIELD, None) or Extension()
        self.client_salt = body.pop(CACHE_SALT, None)
        self.body = body

    async def decide(self) -> None:
        """Decide which experts it may use, and find their slots."""
        services, extension = self.services, self.extension
        now = await self.judge(extension.min_policy_version)
        self.query = DecisionRequest(
            decision_id=f"dec_{uuid.uuid4().hex}",
            purpose=extension.purpose,
            region=extension.region,
            only=extension.experts.only,
            ignore=extension.experts.ignore,
        )
        try:
            self.decision = services.decisions.decide(self.snapshot, self.tenant, self.query, now)
        except PolicyError as error:
            services.samples.add_refused(self.tenant, self.query, error, now)
            raise from_policy(error) from error
        self.context.decision_id = self.decision.decision_id
        self.context.policy_version = self.decision.policy_version
        self.experts, self.weights_epoch = experts_of(self.decision, services.client), services.client.weights_epoch

    def reserve(self) -> None:
        """Reserve the stated tokens; the prompt's are added once it is tokenized."""
        services, scopes = self.services, self.scopes
        if self.extension.explain == COUNTERFACTUAL:
            self.passes = passes_of(self, self.services.clock())
        if limit_cost(scopes):
            self.price = price_of(self.decision, scopes)
        amounts = {REQUESTS: 1, TOKENS: stated_tokens(self.body)}
        if self.price is not None:
            amounts[COST] = 0  # all at once with the tokens: parts of several requests could keep each other out
        self.reservation = services.limiter.reserve(scopes, amounts)
        self.call = GatedCall(
            self.decision.tenant_id,
            self.experts,
            self.decision.valid_until,
            self.client_salt,
            reserve=self._reserve_tokens,
            queue=partial(services.queue.enter, self.tenant),
            confirmed=services.policy.fresh,
            keep_answers=bool(self.passes),
            prompt_only=self.body.get("max_tokens") == 0,
        )
        self.right = Right(self.call, self.principal, self.tenant, self.query, self.snapshot.policy_version)

    def _reserve_tokens(self, *, least: int, most: int) -> int:
        """Reserve the tokens of the response and of all passes, and what they cost at most.

        A request that states no length gets no more than what is left of budgets.
        """
        passes, entries = len(self.passes), 2 if self.passes else 1
        if stated_length(self.body) is None:
            left = self.reservation.left(TOKENS)
            if self.price is not None:
                left = min(left, self.price.tokens(self.reservation.left(COST), entries=entries))
            most = most if left == math.inf else max(least, min(most, int((left - passes) // (1 + passes))))
        tokens = most * (1 + passes) + passes
        cost = {} if self.price is None else {COST: self.price.most(tokens, entries=entries)}
        self.reservation.raise_to(tokens=tokens, **cost)
        return most


def honoured_body(raw: Body, table: Table, check: Callable[[Body, Limits], None], limits: Limits) -> Body:
    """The honoured fields of a body, within limits, and the extension as an `Extension`; raises `Invalid`."""
    body = keep_honoured(raw, table)
    check(body, limits)
    if FIELD in body:
        body[FIELD] = parse_extension(body[FIELD])
    return body


def check_model(body: Body, services: InferenceServices) -> None:
    """Refuse a model that is none of this server's names."""
    model = body.get("model")
    if model is not None and model not in services.model_names:
        name = f" '{model}'" if isinstance(model, str) and len(model) <= MAX_SHOWN and model.isprintable() else ""
        raise NotFound(
            f"The model{name} does not exist. This server has: {', '.join(services.model_names)}.",
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


def experts_of(decision: Decision, client: GatedEngineClient) -> tuple[ExpertSlotRef, ...]:
    """The slots of the allowed experts.

    Raises:
        ApiError: an expert was just revoked or replaced, or the experts leave a layer of the model without any.
    """
    gates = client.gates
    if decision.allowed in gates:
        return gates[decision.allowed]
    try:
        refs = tuple(map(client.refs.__getitem__, decision.allowed))
    except KeyError:
        raise Unavailable(
            "An expert of this request is being replaced or revoked. Try again.", code="experts_changing"
        ) from None
    if not client.slot_map.covers(bitmask_of(refs)):
        raise from_policy(LayerWithoutExpert(LAYER_WITHOUT_EXPERT))
    if len(gates) >= MAX_GATES:
        gates.clear()
    gates[decision.allowed] = refs
    return refs
