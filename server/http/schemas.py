"""What every response is made of: closed models, and the one body of an error."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from flexgate.policies.documents import Grade


def is_none(value: object) -> bool:
    """For fields that are left out where they have no value."""
    return value is None


class Shown(BaseModel):
    """Base of response bodies: closed, so that nothing is shown that is not described."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, json_schema_serialization_defaults_required=True
    )


class Reason(Shown):
    """Why one expert takes no part. `grade`: what excluding it excludes."""

    expert: str
    grade: Grade
    code: str
    rule: str
    message: str


class Denied(Shown):
    """The experts that a request asked for and may not use."""

    excluded: list[Reason]


class ErrorDetail(Shown):
    """What is wrong, where, and what would be right. `code` is what programs should read."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Shown):
    """The one body of an error."""

    error: ErrorDetail
    flexgate: Annotated[Denied | None, Field(exclude_if=is_none)] = None
    received: Annotated[int | None, Field(exclude_if=is_none)] = None
    """Bytes of an upload's file that have arrived, where a part of it does not fit there."""


class ProbeStatus(Shown):
    """The response to a probe."""

    status: Literal["ok", "ready", "not_ready"]
