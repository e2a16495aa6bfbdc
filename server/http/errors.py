"""Errors that reach a client, and the one body that all of them have.

ApiError                 a status, a type of OpenAI's vocabulary, a code, a message, the field
├── Invalid              400  the request is not one that can be served
├── TooLarge             413
├── NotFound             404  nothing of that name, or nothing the caller may know of
└── Unavailable          503  try again later

Every other package's errors are turned into these in `flexgate.server.http.refusals`; HTTP status codes
are chosen there and here alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

from pydantic import ValidationError

CONTEXT_LENGTH_EXCEEDED: Final = "context_length_exceeded"
INVALID_REQUEST: Final = "invalid_request_error"
FORBIDDEN: Final = "request_forbidden"
SERVER_ERROR: Final = "server_error"

INTERNAL_MESSAGE: Final = "The server could not answer this request. Its log has the request id."


class ApiError(Exception):
    """An answer other than success. `details` stands beside `error` in the body; `type_` is only
    given where OpenAI's word does not follow from the status.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = HTTPStatus.INTERNAL_SERVER_ERROR,
        code: str | None = None,
        type_: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = int(status)
        self.code = code
        self.type = type_ or error_type(self.status)
        self.param = param
        self.headers = dict(headers or {})
        self.details = dict(details or {})

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

    def __init__(self, message: str, *, param: str | None, code: str | None) -> None:
        super().__init__(message, status=HTTPStatus.BAD_REQUEST, code=code, param=param)


class TooLarge(ApiError):
    """413: the body is over the limit."""

    def __init__(self, message: str) -> None:
        status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        super().__init__(message, status=status, code="request_too_large")


class NotFound(ApiError):
    """404."""

    def __init__(self, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message, status=HTTPStatus.NOT_FOUND, code=code, param=param)


class Unavailable(ApiError):
    """503: clients may try again."""

    def __init__(self, message: str, *, code: str) -> None:
        status = HTTPStatus.SERVICE_UNAVAILABLE
        super().__init__(message, status=status, code=code, headers={"retry-after": "1"})


def error_type(status: int) -> str:
    """OpenAI's word for a status."""
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return SERVER_ERROR
    return FORBIDDEN if status == HTTPStatus.FORBIDDEN else INVALID_REQUEST


def from_validation(error: ValidationError, *under: str) -> Invalid:
    """The first thing that is wrong with a body or query, by its path below `under`."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    param = path_of((*under, *(step for step in first["loc"] if step != "[key]")))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return Invalid(f"'{param}' is not a field of this request.", param=param, code="unknown_parameter")
    where = "The request" if param is None else f"'{param}'"
    return Invalid(f"{where}: {message}.", param=param, code="invalid_value")


def path_of(place: Sequence[str | int]) -> str | None:
    """`("a", 0, "b")` as clients read it: `a[0].b`."""
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text or None
