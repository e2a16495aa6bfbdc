"""Running requests in the ledger: nothing leaves before they are registered, and no token that no mark covers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING

from msgspec.structs import replace

from flexgate.server.engine.frontend.calls import GatedCall
from flexgate.server.engine.protocol.endings import LEDGER_UNAVAILABLE
from flexgate.server.http.errors import ApiError
from flexgate.server.inference.limits.cost import cost_of
from flexgate.server.inference.openai.vllm_errors import ended_early
from flexgate.server.ledger.entries import COMPLETED, STOPPED, Used
from flexgate.server.ledger.errors import LedgerClosed, LedgerError

if TYPE_CHECKING:
    from flexgate.server.inference.pipeline import InferenceRequest


async def require_registered(request: InferenceRequest) -> None:
    """Wait until the request is on disk; raises `ApiError` where it must be and cannot."""
    if request.entry is None:
        return
    try:
        await request.entry.registered()
    except LedgerError as error:
        require_unrecorded(request, error)


def end(request: InferenceRequest) -> None:
    """Write down what the request used in all."""
    if request.entry is not None:
        outcome = request.call.failed or (COMPLETED if request.completed else STOPPED)
        answer = request.answer.hexdigest() if request.answered else None
        request.entry.end(outcome, replace(used_of(request.call), answer_sha256=answer))


def used_of(call: GatedCall) -> Used:
    """What a call has used so far; of its prompts what the engine has processed: experts had no part in the rest."""
    cached, prompt_2U, completion_2U = call.usage()
    return Used(call.prompt_positions(), cached, call.new_tokens(), prompt_2U, completion_2U)


def used_together(calls: Sequence[GatedCall]) -> Used:
    """What all calls of one entry have used together."""
    parts = [used_of(call) for call in calls]
    return Used(
        sum(part.prompt_tokens for part in parts),
        sum(part.cached_tokens for part in parts),
        sum(part.completion_tokens for part in parts),
        [sum(column) for column in zip_longest(*(part.prompt_2U for part in parts), fillvalue=0)],
        [sum(column) for column in zip_longest(*(part.completion_2U for part in parts), fillvalue=0)],
    )


def cost_so_far(request: InferenceRequest) -> int:
    """What the request cost by its agreements, in billionths, as its entries of the ledger say."""
    if request.entry is None:  # nothing that costs anything goes unrecorded
        return 0
    together = [used_together(calls) for calls in ((request.call,), request.scoring)]
    registration = request.entry.registration
    entries = [(used.parts(registration), used.prompt_tokens + used.completion_tokens) for used in together]
    return cost_of(request.decision, entries)


def processed(call: GatedCall) -> int:
    """How many tokens the engine has processed or generated for a call."""
    return call.prompt_positions() + call.new_tokens()


async def record(request: InferenceRequest) -> bool:
    """Whether all that was used so far is written down, once it is tried."""
    assert request.entry is not None
    call = request.call
    try:
        await request.entry.cover(processed(call), partial(used_of, call))
    except LedgerError as error:
        return _may_go_unrecorded(request, error)
    return True


def _may_go_unrecorded(request: InferenceRequest, error: LedgerError) -> bool:
    """Whether the operator lets requests without duties be served while the ledger fails."""
    if request.services.ledger_failure == "refuse" or isinstance(error, LedgerClosed):
        return False
    return not any(agreement is not None and agreement.duties for agreement in request.decision.agreements)


def require_unrecorded(request: InferenceRequest, error: LedgerError) -> None:
    """Raise the `ApiError` of a request that may not go unrecorded."""
    if not _may_go_unrecorded(request, error):
        raise refused(request.call) from error


def refused(call: GatedCall) -> ApiError:
    """The error of a request that the ledger does not take."""
    call.failed = LEDGER_UNAVAILABLE
    error = ended_early(call)
    assert error is not None
    return error
