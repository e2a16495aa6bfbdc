"""vLLM's errors in this server's shape: its exceptions, its error objects, its error chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from pydantic import ValidationError

from flexgate.policies.field_errors import first_field_error, path_of
from flexgate.server.engine.frontend.calls import GatedCall
from flexgate.server.engine.protocol.endings import (
    CONSTRAINT_BUSY,
    CONSTRAINT_SLOW,
    CONSTRAINT_UNAVAILABLE,
    EXPERT_REVOKED,
    GATE_EXPIRED,
    KEY_EXPIRED,
    KEY_REVOKED,
    LEDGER_UNAVAILABLE,
    NUMBERS_OVERFLOWED,
    PERMISSION_ENDED,
    POLICY_UNAVAILABLE,
    PROJECT_ARCHIVED,
    QUEUED_TOO_LONG,
)
from flexgate.server.engine.seam.openai import ErrorInfo, ErrorResponse, VLLMValidationError, create_error_response
from flexgate.server.http.auth import BEARER, INVALID_API_KEY
from flexgate.server.http.errors import (
    CONTEXT_LENGTH_EXCEEDED,
    INTERNAL_MESSAGE,
    PROMPT_TOO_LONG,
    ApiError,
    Forbidden,
    Invalid,
    Unauthorized,
    Unavailable,
    is_absent,
    is_server_fault,
    is_unavailable,
)

_End = tuple[type[ApiError], str, str]
_CONSTRAINTS: Final = ("structured_outputs", "response_format", "text", "tools")
_PERMISSION_ENDED: Final[_End] = (
    Forbidden,
    "expert_permission_ended",
    "The request was ended because its permission to use an expert, or to leave one out, has ended. "
    "Send it again to use the experts that are permitted and required now.",
)
_ENDED: Final[dict[str, _End]] = {
    EXPERT_REVOKED: (
        Forbidden,
        "expert_revoked",
        "The request was ended because an expert that it could use was revoked. "
        "Send it again to use the experts that are loaded now.",
    ),
    GATE_EXPIRED: _PERMISSION_ENDED,
    PERMISSION_ENDED: _PERMISSION_ENDED,
    NUMBERS_OVERFLOWED: (
        ApiError,
        "numbers_overflowed",
        "The model computed NaN or infinity for this request, and would again. Exclude the expert that causes it with "
        "'flexgate.experts.ignore', or tell the operator.",
    ),
    KEY_REVOKED: (
        Unauthorized,
        INVALID_API_KEY,
        "The request was ended because its API key was revoked. Use another key.",
    ),
    KEY_EXPIRED: (
        Unauthorized,
        INVALID_API_KEY,
        "The request was ended because its API key has expired. Use another key.",
    ),
    PROJECT_ARCHIVED: (
        Unauthorized,
        INVALID_API_KEY,
        "The request was ended because its project was archived. Use a key of another project.",
    ),
    QUEUED_TOO_LONG: (
        Unavailable,
        "queued_too_long",
        "The request has waited for the engine for the longest time allowed (--queue-seconds). Try again later.",
    ),
    CONSTRAINT_BUSY: (
        Unavailable,
        "constraint_busy",
        "The request was ended because too many constraints of its project wait to be compiled. Try again.",
    ),
    LEDGER_UNAVAILABLE: (
        Unavailable,
        "ledger_unavailable",
        "This server cannot record what the request uses. Try again, or ask the operator to check the ledger's disk.",
    ),
    CONSTRAINT_UNAVAILABLE: (
        Unavailable,
        "constraint_unavailable",
        "The request was ended because the process that evaluates its constraint ended or did not respond. Try again.",
    ),
    POLICY_UNAVAILABLE: (
        Unavailable,
        "policy_unavailable",
        "The request was ended because this server lost its policy database. Try again.",
    ),
}
"""By the reason that ended a call: kind, code, message. A key that is good no more has one code, before and after."""
_HEADERS: Final[dict[type[ApiError], dict[str, str]]] = {
    ApiError: {"x-should-retry": "false"},  # OpenAI's clients would send it again
    Unauthorized: BEARER,
}
_PROMPTS: Final = ("messages", "prompt", "input", "tokens")
_INSIDE: Final = frozenset(["max_model_len"])  # no field of a request
_TOO_LONG: Final = frozenset(["input_tokens", "input_text"])  # vLLM's words for what it counted


def from_exception(error: Exception, body: dict[str, Any]) -> ApiError:
    """What a handler or vLLM's request type raised; `body` is what they were given."""
    if isinstance(error, ValidationError):
        return _from_validation(error, body)
    if isinstance(error, VLLMValidationError):
        return _from_vllm_validation(error, body)
    return from_info(create_error_response(error).error)


def from_response(response: ErrorResponse, body: Mapping[str, Any] = MappingProxyType({})) -> ApiError:
    """What a handler returned, or wrote into a stream, instead of a response to `body`."""
    return from_info(response.error, body)


def from_info(info: ErrorInfo, body: Mapping[str, Any] = MappingProxyType({})) -> ApiError:
    """vLLM's error object. What went wrong inside the server is not disclosed."""
    if is_server_fault(info.code):
        if is_unavailable(info.code):
            return Unavailable(info.message, code="engine_overloaded")
        return ApiError(INTERNAL_MESSAGE, code="internal_error")
    if is_absent(info.code):
        code = "model_not_found" if info.param == "model" else None
        return ApiError(info.message, status=info.code, code=code, param=info.param)
    param = info.param or constraint_of(body)
    return ApiError(info.message, status=info.code, code="invalid_value", param=param)


def constraint_of(body: Mapping[str, Any]) -> str | None:
    """The field that constrains the response, if one does."""
    return next((name for name in _CONSTRAINTS if body.get(name) is not None), None)


def not_generated(body: Mapping[str, Any]) -> ApiError | None:
    """The error for a response that failed in a healthy engine, if the request's constraint is the likely cause."""
    param = constraint_of(body)
    if param is None:
        return None
    return Invalid(
        f"The model could not generate an answer that satisfies '{param}'. Simplify the constraint.",
        param=param,
        code="constraint_failed",
    )


def ended_early(call: GatedCall) -> ApiError | None:
    """Why a call's request was ended, if its gate or its right to run was the cause."""
    if call.failed == CONSTRAINT_SLOW:
        message = (
            "The answer was ended: evaluating its constraint took too long. Simplify the schema, pattern or grammar."
        )
        return Invalid(message, param=None, code="constraint_too_slow")
    ended = _ENDED.get(call.failed or "")
    if ended is None:
        return None
    kind, code, message = ended
    if kind is Unavailable:
        return Unavailable(message, code=code, retry_after=60 if call.failed == QUEUED_TOO_LONG else 1)
    return kind(message, code=code, headers=_HEADERS.get(kind))


def _from_vllm_validation(error: VLLMValidationError, body: Mapping[str, Any]) -> Invalid:
    message, named = str(error.args[0]), error.parameter
    prompt = next((name for name in _PROMPTS if name in body), None)
    if named in _TOO_LONG:
        return Invalid(f"{PROMPT_TOO_LONG}: {message}", param=prompt, code=CONTEXT_LENGTH_EXCEEDED)
    if named == "max_tokens" and error.value == 0:  # what vLLM has left for the answer: no request may ask for none
        message = (
            f"{PROMPT_TOO_LONG}: '{prompt}' takes all tokens of this model's context: none is left for an answer. "
            "Shorten it by at least one token."
        )
        return Invalid(message, param=prompt, code=CONTEXT_LENGTH_EXCEEDED)
    param = None if named in _INSIDE else named
    return Invalid(message, param=param or constraint_of(body), code="invalid_value")


def _from_validation(error: ValidationError, body: dict[str, Any]) -> ApiError:
    found = first_field_error(error)
    param = path_of(_known_place(found.place, body))
    if param is None and found.whole:  # vLLM's own sentence
        return Invalid(found.says, param=None, code="invalid_value")
    what = f"'{param}'" if param else "The request"
    return Invalid(f"{found.about(what)}.", param=param, code="invalid_value")


def _known_place(place: Sequence[str | int], body: Any) -> list[str | int]:
    """The steps of `place` that lead into `body`: pydantic adds names of its own types."""
    known: list[str | int] = []
    for step in place:
        if isinstance(step, str) and isinstance(body, dict) and (step in body or not known):
            known.append(step)
            body = body.get(step)
        elif isinstance(step, int) and isinstance(body, list) and step < len(body):
            known.append(step)
            body = body[step]
    return known
