"""Leave-one-out on demand: how likely a response's tokens are without each expert that took part in it.

The prompt and the response are scored again, under the request's gate and under this gate without one expert. Excluding
an expert equals removing it, so the difference is exactly what it contributed. The gate itself is scored again as well:
what was computed token by token, beside other requests, has other last bits.

A pass is a request like any other: it waits its turn, its gate is sealed, it ends with the rights of the request, and
what its experts do is recorded. It shares no cache with anything.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from msgspec import structs

from flexgate.policies.decide import decide
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.errors import DecisionRefused
from flexgate.server.engine.frontend.calls import CURRENT_CALL, Answer, ExpertSlotRef, GatedCall, bitmask_of
from flexgate.server.engine.seam.openai import SamplingParams
from flexgate.server.http.errors import Invalid
from flexgate.server.inference.enforcement import Right
from flexgate.server.inference.recording import processed, refused, used_together
from flexgate.server.inference.request.extension import COUNTERFACTUAL, FIELD
from flexgate.server.ledger.entries import COMPLETED, MICROSECONDS, STOPPED
from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.journal import Entry

if TYPE_CHECKING:
    from flexgate.server.engine.frontend.client import GatedEngineClient
    from flexgate.server.inference.pipeline import InferenceRequest


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """What leaving each expert out changes.

    Attributes:
        logprob: log-probability of all tokens of the response under the request's gate, in nats.
        delta_logprob: by how much it is larger than without an expert; of experts that took part and can be left out.
        passes: how often a response was scored.
        tokens: positions that were computed for it.
    """

    logprob: float
    delta_logprob: dict[str, float]
    passes: int
    tokens: int


class Pass(NamedTuple):
    """What a response is scored under: the experts, what asks for them, and until when it may run (Unix seconds)."""

    left_out: str | None
    query: DecisionRequest
    experts: tuple[ExpertSlotRef, ...]
    valid_until: float


def passes_of(request: InferenceRequest, now: float) -> tuple[Pass, ...]:
    """How its response is scored at most: under its gate, and without each expert that may be left out at `now`.

    Raises:
        Invalid: it is streamed, or there is not exactly one response to score.
    """
    body = request.body
    if body.get("stream"):
        _refuse("needs a response that is not streamed: leave 'stream' out")
    if body.get("n", 1) != 1 or len(body.get("prompt", ())) > 1:
        _refuse("scores one response: send one prompt, and leave 'n' out")
    if body.get("max_tokens") == 0:
        _refuse("has no response to score: leave 'max_tokens' out, or set 1 or more")
    own = Pass(None, request.query, request.experts, request.decision.valid_until)
    return (own, *_optional(request, now))


async def leave_one_out(request: InferenceRequest) -> Counterfactual:
    """Score a response that is complete, once more for each expert that took part in it and may be left out.

    Raises:
        ApiError: the request lost its right meanwhile, or prompt and response leave no room in the model's length.
    """
    used = {use.expert for use in request.call.attribution().experts if use.tokens}
    passes = [one for one in request.passes if one.left_out is None or one.left_out in used]
    if any(len(prompt + answer) >= request.services.limits.prompt_tokens for prompt, answer in request.call.answers):
        _refuse("has no room to score a response that fills the model's length: set a smaller 'max_tokens'")
    with _calls(request, passes) as calls:
        try:
            answers, client = request.call.answers, request.services.client
            base, *without = await _together([_score(call, client, answers) for call in calls])
        except Exception:
            request.call.failed = request.call.failed or _failed(calls)
            raise
        left_out = (one.left_out for one in passes if one.left_out is not None)
        deltas = {expert: base - other for expert, other in zip(left_out, without, strict=True)}
        return Counterfactual(base, deltas, len(calls), sum(call.tokens() for call in calls))


def _optional(request: InferenceRequest, now: float) -> Iterator[Pass]:
    """The passes without one expert, where the project might ask for just that and each layer keeps an expert."""
    covers = request.services.client.slot_map.covers
    for out in request.experts:
        rest = tuple(ref for ref in request.experts if ref != out)
        query = replace(request.query, ignore=(*request.query.ignore, out.expert))
        try:
            decision = decide(request.snapshot, request.tenant, query, now)
        except DecisionRefused:
            continue
        if decision.allowed == tuple(ref.expert for ref in rest) and covers(bitmask_of(rest)):
            yield Pass(out.expert, query, rest, decision.valid_until)


@contextmanager
def _calls(request: InferenceRequest, passes: Sequence[Pass]) -> Iterator[list[GatedCall]]:
    """A call for each gate, which ends with the rights of the request; what they use is one entry of the ledger."""
    services, own = request.services, request.call
    calls = [
        GatedCall(
            own.tenant,
            one.experts,
            min(one.valid_until, own.gate_until),
            uuid.uuid4().hex,
            queue=partial(services.queue.enter, request.tenant),
            confirmed=services.policy.fresh,
        )
        for one in passes
    ]
    entry, request.scoring = _register(request), calls
    completed = False
    try:
        for call, one in zip(calls, passes, strict=True):
            call.record = partial(_record, entry, calls)
            services.client.begin(call)
            services.running.begin(
                Right(call, request.principal, request.tenant, one.query, request.snapshot.policy_version)
            )
        yield calls
        completed = True
    finally:
        entry.end(COMPLETED if completed else _failed(calls) or STOPPED, used_together(calls))
        for call in calls:
            services.running.end(call)
            services.client.end(call)


def _failed(calls: Sequence[GatedCall]) -> str | None:
    """Why one of them was ended early."""
    return next((call.failed for call in calls if call.failed is not None), None)


def _register(request: InferenceRequest) -> Entry:
    if request.entry is None:  # the ledger failed when it began, and what this would use is not recorded either
        raise refused(request.call)
    own = request.entry.registration
    registration = structs.replace(
        own,
        request=f"{own.request}_{COUNTERFACTUAL}",
        registered_at=round(request.services.clock() * MICROSECONDS),
        endpoint=f"{own.endpoint}#{COUNTERFACTUAL}",
    )
    try:
        return request.services.ledger.register(registration)
    except LedgerError as error:
        raise refused(request.call) from error


async def _record(entry: Entry, calls: Sequence[GatedCall]) -> bool:
    try:
        await entry.cover(sum(map(processed, calls)), partial(used_together, calls))
    except LedgerError:
        return False
    return True


async def _together(scoring: Sequence[Coroutine[Any, Any, float]]) -> list[float]:
    """What all return; where one raises, the others are cancelled."""
    tasks = [asyncio.ensure_future(one) for one in scoring]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _score(call: GatedCall, client: GatedEngineClient, answers: Sequence[Answer]) -> float:
    """Log-probability of the answers' tokens under the gate of a call."""
    CURRENT_CALL.set(call)  # of this task alone
    total = 0.0
    for prompt, answer in answers:
        tokens = prompt + answer
        outputs = client.generate(
            {"type": "token", "prompt_token_ids": tokens},
            SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0),
            COUNTERFACTUAL,
        )
        async for output in outputs:
            scored = output.prompt_logprobs
        total += math.fsum(scored.of_prompt()[len(prompt) - 1 :])
    return total


def _refuse(why: str) -> NoReturn:
    raise Invalid(f"'{FIELD}.explain': '{COUNTERFACTUAL}' {why}.", param=f"{FIELD}.explain", code="invalid_value")
