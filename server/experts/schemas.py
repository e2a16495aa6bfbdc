"""What the routes that change experts take."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from flexgate.server.http.validation import Closed

PackageName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Bytes = Annotated[int, Field(ge=1, le=1 << 40, strict=True)]


class AddBody(Closed):
    """A package by its name under --experts-dir, or by the id of a complete upload."""

    package: PackageName | None = None
    upload: str | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.package is None) == (self.upload is None):
            raise ValueError("give either 'package' or 'upload'")
        return self


class RevokeQuery(Closed):
    """How long running requests may go on before they are ended."""

    drain_seconds: Annotated[float, Field(ge=0, le=600)] = 0.0


class JobQuery(Closed):
    """`stream` sends every state as a server-sent event until the job has ended."""

    stream: bool = False


class UploadBody(Closed):
    """The package's files with their sizes in bytes."""

    files: Annotated[dict[str, Bytes], Field(max_length=8)]


class WriteQuery(Closed):
    """Where in the file the body belongs."""

    offset: Annotated[int, Field(ge=0)]
