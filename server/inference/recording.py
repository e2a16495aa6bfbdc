"""Requests in the ledger: registered before anything of a response leaves, and no token leaves that no mark covers."""

from __future__ import annotations

from functools import partial
from typing import Final

from flexgate.policies.ids import ExpertId
from flexgate.server.engine.frontend.calls import GatedCall
from flexgate.server.engine.protocol.endings import LEDGER_UNAVAILABLE
from flexgate.server.http.errors import ApiError
from flexgate.server.inference.openai.vllm_errors import ended_early
from flexgate.server.inference.pipeline import InferenceRequest
from flexgate.server.ledger.entries import COMPLETED, Registration, Used, microseconds
from flexgate.server.ledger.journal import LedgerError

STOPPED: Final = "stopped"
"""The outcome where the client left, or an error that is no reason of ours ended the response."""


def register(request: InferenceRequest) -> None:
    """Write down a request that may go to the engine, and have its engine requests wait for their marks.

    Raises:
        ApiError: the server is stopping.
    """
    call, decision, experts = request.call, request.decision, request.snapshot.experts
    registration = Registration(
        request=decision.decision_id,
        registered_at=microseconds(request.services.clock()),
        tenant=decision.tenant_id,
        key_id=request.principal.key_id,
        endpoint=request.http.scope["path"],
        model=request.services.model_names[0],
        policy_version=decision.policy_version,
        weights_epoch=request.weights_epoch,
        experts=tuple((ref.slot, ref.expert, experts[ExpertId(ref.expert)].owner) for ref in call.experts),
    )
    try:
        request.entry = request.services.ledger.register(registration)
    except LedgerError as error:
        raise _refused(call) from error
    call.record = partial(_record, request)


async def require_registered(request: InferenceRequest) -> None:
    """Wait until the request is on disk; raises `ApiError` where it cannot be."""
    assert request.entry is not None
    try:
        await request.entry.registered()
    except LedgerError as error:
        raise _refused(request.call) from error


def end(request: InferenceRequest) -> None:
    """Write down what the request used in all."""
    if request.entry is not None:
        outcome = request.call.failed or (COMPLETED if request.completed else STOPPED)
        request.entry.end(outcome, used_of(request.call))


def used_of(call: GatedCall) -> Used:
    """What a call has used so far."""
    cached, prompt_2U, completion_2U = call.usage()
    return Used(call.prompt_tokens(), cached, call.new_tokens(), prompt_2U, completion_2U)


async def _record(request: InferenceRequest) -> bool:
    assert request.entry is not None
    try:
        await request.entry.cover(request.call.tokens(), partial(used_of, request.call))
    except LedgerError:
        return False
    return True


def _refused(call: GatedCall) -> ApiError:
    call.failed = LEDGER_UNAVAILABLE
    error = ended_early(call)
    assert error is not None
    return error
