"""Which status and code each refusal of another package becomes."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final

from flexgate.policies.decision import Reason
from flexgate.policies.errors import (
    ChangeRefused,
    ConfirmationRequired,
    ContextRefused,
    DecisionRefused,
    EmptyGate,
    ExpertDenied,
    ExpertRequired,
    GradeTooLow,
    LayerWithoutExpert,
    ObjectUnknown,
    PolicyError,
    RequiredExpertMissing,
    StoreFull,
    TenantArchived,
    UnknownExpert,
    UnknownTenant,
)
from flexgate.server.http.errors import ApiError, Invalid, NotFound, Unavailable
from flexgate.server.ledger.errors import LedgerError, TooMuchAsked

UNKNOWN_EXPERT = "expert_not_found"
_DENIED: Final = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.TOO_MANY_REQUESTS})
_DENIALS: Final = frozenset({UNKNOWN_EXPERT, "not_found", "context_refused", "expert_required"})


def is_denial(error: ApiError) -> bool:
    """Whether a request was denied a right, rather than malformed."""
    return error.status in _DENIED or error.code in _DENIALS


def from_policy(error: PolicyError) -> ApiError:
    """The refusal of a request that gets no gate."""
    if isinstance(error, DecisionRefused):
        return _from_decision(error)
    return Unavailable("The server cannot reach its policy database. Try again.", code="policy_unavailable")


def from_change(error: PolicyError) -> ApiError:
    """The administration's response to a refused change. Absent and not the caller's are told alike."""
    if isinstance(error, ObjectUnknown | UnknownTenant):
        return not_found()
    if isinstance(error, ChangeRefused):
        code = "confirmation_required" if isinstance(error, ConfirmationRequired) else "change_refused"
        param = "confirm" if isinstance(error, ConfirmationRequired) else None
        return Invalid(_sentence(error), param=param, code=code)
    if isinstance(error, StoreFull):
        return ApiError(_sentence(error), status=HTTPStatus.INSUFFICIENT_STORAGE, code="disk_full")
    return from_policy(error)


def from_ledger(
    error: LedgerError, *, param: str = "start_time", advice: str = "ask for less time, or group by less"
) -> ApiError:
    """The administration's response where the ledger cannot be read, or not be summed.

    Args:
        param: names what asked for too much.
        advice: how to ask for less.
    """
    if isinstance(error, TooMuchAsked):
        return Invalid(f"{_sentence(error)[:-1]}: {advice}.", param=param, code="query_too_large")
    return Unavailable(_sentence(error), code="ledger_unavailable")


def not_found() -> NotFound:
    """The one response for what does not exist and for what is not the caller's."""
    return NotFound("No object with this id is visible to this key. Check the id and the key.", code="not_found")


def _sentence(error: Exception) -> str:
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."


def _from_decision(error: DecisionRefused) -> ApiError:
    message = str(error)
    if isinstance(error, ExpertDenied):
        return ApiError(
            message,
            status=HTTPStatus.FORBIDDEN,
            code="expert_policy_denied",
            param=error.param,
            details={"flexgate": {"excluded": [reason_json(r) for r in error.reasons]}},
        )
    if isinstance(error, UnknownExpert):
        return NotFound(message, code=UNKNOWN_EXPERT, param=error.param)
    if isinstance(error, LayerWithoutExpert):
        return ApiError(message, status=HTTPStatus.FORBIDDEN, code="layer_without_expert")
    if isinstance(error, GradeTooLow):
        return ApiError(message, status=HTTPStatus.FORBIDDEN, code="grade_too_low")
    if isinstance(error, UnknownTenant | TenantArchived):
        return ApiError(message, status=HTTPStatus.FORBIDDEN, code="project_not_active")
    if isinstance(error, RequiredExpertMissing):
        return Unavailable(message, code="required_expert_missing")
    codes: dict[type[DecisionRefused], str] = {
        ContextRefused: "context_refused",
        EmptyGate: "empty_gate",
        ExpertRequired: "expert_required",
    }
    return Invalid(message, param=error.param, code=codes.get(type(error), "policy_refused"))


def reason_json(reason: Reason) -> dict[str, Any]:
    """Why one expert takes no part, as every response shows it."""
    return {
        "expert": reason.expert,
        "grade": reason.grade,
        "code": reason.code,
        "rule": reason.rule,
        "message": reason.message,
    }
