"""Errors that reach a client, and the one body that all of them have.

ApiError                 500  a status, a type of OpenAI's vocabulary, a code, a message, the field
├── Invalid              400  the request is not one that can be served
├── Unauthorized         401  it is not known who calls
├── Forbidden            403  it is known, and may not
├── NotFound             404  nothing of that name, or nothing the caller may know of
├── TimedOut             408  the client sent nothing more
├── Conflict             409  not as things stand now
├── TooLarge             413  the body is over the limit
├── TooMany              429  a limit; later, or with a higher one
├── Unavailable          503  try again later
└── OutOfSpace           507  the disk has no room

Errors of other packages are turned into these in `flexgate.server.http.refusals`. HTTP status codes are chosen in
`flexgate.server.http` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar, Final

from pydantic import ValidationError

from flexgate.policies.field_errors import NO_SUCH_FIELD, first_field_error, path_of

CONTEXT_LENGTH_EXCEEDED: Final = "context_length_exceeded"
PROMPT_TOO_LONG: Final = "The prompt is too long"
"""How its messages begin: openai 3 shows no code in an error's text, and LangChain looks for these words in it."""
UNKNOWN_FIELD: Final = "is not a field of this request"
INVALID_REQUEST: Final = "invalid_request_error"
FORBIDDEN: Final = "request_forbidden"
SERVER_ERROR: Final = "server_error"

_SERVER_FAULTS: Final = HTTPStatus.INTERNAL_SERVER_ERROR
INTERNAL_MESSAGE: Final = "The server could not answer this request. Its log has the request id."


class ApiError(Exception):
    """A response other than success. `details` stands beside `error` in the body; `type_` is only
    given where OpenAI's word does not follow from the status.
    """

    usual_status: ClassVar[int] = HTTPStatus.INTERNAL_SERVER_ERROR

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        type_: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = int(self.usual_status if status is None else status)
        self.code = code
        self.type = type_ or error_type(self.status)
        self.param = param
        self.headers = dict(headers or {})
        self.details = dict(details or {})

    @property
    def server_fault(self) -> bool:
        """Whether the server is to blame, not the request."""
        return is_server_fault(self.status)

    @property
    def rules(self) -> tuple[tuple[str, str, str], ...]:
        """Expert, code and rule of each reason that the body gives."""
        reasons = self.details.get("flexgate", {}).get("excluded", ())
        return tuple((reason["expert"], reason["code"], reason["rule"]) for reason in reasons)

    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`, the only shape an error has here."""
        error = {"message": str(self), "type": self.type, "param": self.param, "code": self.code}
        return {"error": error, **self.details}


class Invalid(ApiError):
    """400: `param` names the field, `code` says what is wrong with it."""

    usual_status = HTTPStatus.BAD_REQUEST

    def __init__(self, message: str, *, param: str | None, code: str | None) -> None:
        super().__init__(message, code=code, param=param)


class Unauthorized(ApiError):
    """401: it is not known who calls."""

    usual_status = HTTPStatus.UNAUTHORIZED


class Forbidden(ApiError):
    """403: it is known who calls, and they may not."""

    usual_status = HTTPStatus.FORBIDDEN


class TimedOut(ApiError):
    """408: the client sent nothing more."""

    usual_status = HTTPStatus.REQUEST_TIMEOUT


class Conflict(ApiError):
    """409: it cannot be done as things stand now."""

    usual_status = HTTPStatus.CONFLICT


class TooLarge(ApiError):
    """413: the body is over the limit."""

    usual_status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE

    def __init__(self, message: str) -> None:
        super().__init__(message, code="request_too_large")


class TooMany(ApiError):
    """429: a limit is reached; `type_` says which kind."""

    usual_status = HTTPStatus.TOO_MANY_REQUESTS


class OutOfSpace(ApiError):
    """507: the disk has no room."""

    usual_status = HTTPStatus.INSUFFICIENT_STORAGE


class NotFound(ApiError):
    """404."""

    usual_status = HTTPStatus.NOT_FOUND

    def __init__(self, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message, code=code, param=param)


class Unavailable(ApiError):
    """503: clients may try again."""

    usual_status = HTTPStatus.SERVICE_UNAVAILABLE

    def __init__(self, message: str, *, code: str, retry_after: int = 1, param: str | None = None) -> None:
        super().__init__(message, code=code, param=param, headers={"retry-after": str(retry_after)})


def is_server_fault(status: int) -> bool:
    """Whether a status blames the server."""
    return status >= _SERVER_FAULTS


def is_unavailable(status: int) -> bool:
    """Whether a status says to try again later."""
    return status == HTTPStatus.SERVICE_UNAVAILABLE


def is_absent(status: int) -> bool:
    """Whether a status says that there is nothing of that name."""
    return status == HTTPStatus.NOT_FOUND


def error_type(status: int) -> str:
    """OpenAI's word for a status."""
    if is_server_fault(status):
        return SERVER_ERROR
    return FORBIDDEN if status == HTTPStatus.FORBIDDEN else INVALID_REQUEST


def from_validation(error: ValidationError, *under: str, unknown: str = UNKNOWN_FIELD) -> Invalid:
    """The first thing that is wrong with a body or query, by its path below `under`; `unknown` says what it has not."""
    found = first_field_error(error)
    param = path_of((*under, *found.place))
    if found.kind == NO_SUCH_FIELD:
        return Invalid(f"'{param}' {unknown}.", param=param, code="unknown_parameter")
    sentence = found.sentence("the request") if param is None else found.about(f"'{param}'")
    return Invalid(f"{sentence[:1].upper()}{sentence[1:]}.", param=param, code="invalid_value")
