"""What the routes that change experts take."""

from __future__ import annotations

from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from flexgate.server.errors import from_validation

PackageName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Bytes = Annotated[int, Field(ge=1, le=1 << 40, strict=True)]
M = TypeVar("M", bound=BaseModel)


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AddBody(_Closed):
    """A package by its name under --experts-dir, or by the id of a complete upload."""

    package: PackageName | None = None
    upload: str | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.package is None) == (self.upload is None):
            raise ValueError("give either 'package' or 'upload'")
        return self


class RevokeQuery(_Closed):
    """How long running requests may go on before they are ended."""

    drain_seconds: Annotated[float, Field(ge=0, le=600)] = 0.0


class JobQuery(_Closed):
    """`stream` sends every state as a server-sent event until the job has ended."""

    stream: bool = False


class UploadBody(_Closed):
    """The package's files with their sizes in bytes."""

    files: Annotated[dict[str, Bytes], Field(max_length=8)]


class WriteQuery(_Closed):
    """Where in the file the body belongs."""

    offset: Annotated[int, Field(ge=0)]


def parsed(kind: type[M], values: Any) -> M:
    """Check a body or query; raises `Invalid` naming the field."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise from_validation(error) from None
