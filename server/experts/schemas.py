"""What the routes of experts take and answer."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from flexgate.policies.documents import Grade
from flexgate.server.http.schemas import Reason, Shown
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


class ExpertForTenant(Shown):
    """An expert that is listed for the project, and whether it may use it. `grade`: what excluding it excludes."""

    id: str
    object: Literal["expert"] = "expert"
    owner: str | None
    domain: str
    grade: Grade
    live: bool
    allowed: bool
    reason: Reason | None


class ExpertForOperator(Shown):
    """An expert of the catalogue, and the slot that it is loaded in. `grade`: what excluding it excludes."""

    id: str
    object: Literal["expert"] = "expert"
    owner: str | None
    domain: str
    grade: Grade
    live: bool
    visibility: Literal["listed", "hidden"]
    slot: int | None
    slot_epoch: int | None


class ExpertList(Shown):
    """All experts that are listed for the key."""

    object: Literal["list"] = "list"
    data: list[ExpertForTenant | ExpertForOperator]


class JobProgress(Shown):
    """How far a stage is: `done` of `total`, in `unit`."""

    done: int
    total: int
    unit: str


class JobError(Shown):
    """Why a job failed."""

    code: str
    message: str


class JobResult(Shown):
    """Where an added expert is loaded; `digests` are its slot's, one of each rank."""

    slot: int
    slot_epoch: int
    weights_epoch: int
    digests: list[str]


class ExpertJob(Shown):
    """One expert on its way in."""

    id: str
    object: Literal["expert.job"] = "expert.job"
    package: str
    expert: str | None
    version: int | None
    status: Literal["running", "succeeded", "failed"]
    stage: str
    stages: list[str]
    progress: JobProgress
    created_at: int
    finished_at: int | None
    error: JobError | None
    result: JobResult | None


class UnservedProjects(Shown):
    """The projects whose requests must use the expert, and are refused until it is loaded again: how many, and the
    first of them.
    """

    total: int
    ids: list[str]


class ExpertRevocation(Shown):
    """What was ended and cleared when an expert was revoked. Times are Unix seconds; `digests` the cleared slot's.

    `unserved_projects` is null for an owner's key.
    """

    object: Literal["expert.revocation"] = "expert.revocation"
    expert: str
    slot: int
    slot_epoch: int
    weights_epoch: int
    requested_at: float
    effective_at: float
    aborted_requests: int
    evicted_blocks: int
    undelivered_responses: int
    digests: list[str]
    unserved_projects: UnservedProjects | None


class UploadedFile(Shown):
    """A file's announced size, and how much of it has arrived, in bytes."""

    bytes: int
    received: int


class ExpertUpload(Shown):
    """A package on its way in."""

    id: str
    object: Literal["expert.upload"] = "expert.upload"
    files: dict[str, UploadedFile]


class UploadDeleted(Shown):
    """An upload that was given up."""

    id: str
    object: Literal["expert.upload"] = "expert.upload"
    deleted: Literal[True] = True
