"""`POST /v1/experts`, `DELETE /v1/experts/{expert}`, jobs and uploads: what changes the loaded experts.

Administrators change every expert; owners their own, and learn of no other.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

from flexgate.policies.documents import Role
from flexgate.policies.explain import needing
from flexgate.policies.ids import ExpertId
from flexgate.policies.snapshot import Snapshot
from flexgate.server.admin.operation import Call, Nothing, Unread
from flexgate.server.admin.router import OperationRouter
from flexgate.server.experts.errors import ChangeConflict, ExpertError, NotLoaded, NotStored
from flexgate.server.experts.jobs import MOST_WATCHED, Job
from flexgate.server.experts.revoke import MOST_UNSERVED
from flexgate.server.experts.schemas import (
    AddBody,
    ExpertJob,
    ExpertRevocation,
    ExpertUpload,
    JobQuery,
    RevokeQuery,
    UnservedProjects,
    UploadBody,
    UploadDeleted,
    WriteQuery,
)
from flexgate.server.experts.uploads import Upload
from flexgate.server.http.auth import Principal
from flexgate.server.http.connections import EventStream
from flexgate.server.http.errors import ApiError, Conflict, Invalid, NotFound, TooMany, Unavailable
from flexgate.server.http.long_requests import while_identified
from flexgate.server.http.refusals import UNKNOWN_EXPERT
from flexgate.server.http.responses import ACCEPTED, CREATED
from flexgate.server.inference.openai.sse import DONE
from flexgate.server.policy.executors import CHANGES, REMOVALS, UPLOADS, run_in

MOST_JOBS = 4
_READ_ALL: Final = (Role.ADMIN, Role.AUDITOR)


_CHANGES: Final = (Role.ADMIN, Role.OWNER)
_UPLOADS: Final = "/v1/expert_uploads"
router: Final = OperationRouter()


@router.operation("POST", "/v1/experts", roles=_CHANGES, status=ACCEPTED)
async def add(call: Call[AddBody, Nothing]) -> ExpertJob:
    """Add an expert to the running engine, as a job."""
    jobs, principal, body = call.services.experts.jobs, call.principal, call.body
    if jobs.running(principal.limited_with) >= MOST_JOBS:
        raise Conflict(f"{MOST_JOBS} jobs are running already. Wait for one of them.", code="too_many_jobs")
    if body.upload is None and principal.role is not Role.ADMIN:
        raise Invalid("An owner's key adds packages by upload.", param="package", code="upload_required")
    job = await asyncio.shield(_start(call))  # a client that leaves leaves no upload that is taken and in no job
    call.headers["location"] = f"/v1/expert_jobs/{job.id}"
    return job.shown()


async def _start(call: Call[AddBody, Nothing]) -> Job:
    service, principal, upload = call.services.experts, call.principal, call.body.upload
    with service.jobs.opening(principal.limited_with):
        source = await run_in(UPLOADS, _source, call)
    return service.start_add(
        source,
        name=upload or source.name,
        actor=principal.key_id,
        limited_with=principal.limited_with,
        owner=principal.owner_id,
        move=upload is not None,
    )


@router.operation("GET", "/v1/expert_jobs/{job}", roles=(*_CHANGES, Role.AUDITOR))
async def job(call: Call[Nothing, JobQuery]) -> ExpertJob | EventStream:
    """Show a job's progress; with ?stream=true, stream its states as events."""
    principal, jobs = call.principal, call.services.experts.jobs
    found = jobs.get(call.path["job"])
    if found is None or (principal.role not in _READ_ALL and found.limited_with != principal.limited_with):
        raise NotFound("There is no such job. The newest hundred are kept until a restart.", code="job_not_found")
    if call.query.stream:
        states = jobs.watch(found, principal.limited_with)
        if states is None:
            raise TooMany(
                f"{MOST_WATCHED} streams of jobs are open already. Close one of them, or ask without 'stream'.",
                code="rate_limit_exceeded",
                type_="requests",
                headers={"retry-after": "1"},
            )
        return EventStream(_events(while_identified(call.request, call.services, states)))
    return found.shown()


@router.operation("DELETE", "/v1/experts/{expert}", roles=_CHANGES, patient=True)
async def revoke(call: Call[Nothing, RevokeQuery]) -> ExpertRevocation:
    """Revoke an expert. The response comes once no request can use it any more."""
    principal, expert = call.principal, call.path["expert"]
    if not _may_revoke(principal, call.snapshot, expert):
        raise _unknown()
    try:
        done = await call.services.experts.revoke(
            expert, actor=principal.key_id, drain_seconds=call.query.drain_seconds
        )
    except ExpertError as error:
        raise _answer(error) from error
    unserved = await run_in(CHANGES, _unserved, call)
    return ExpertRevocation(**done, unserved_projects=unserved)


@router.operation("POST", _UPLOADS, roles=_CHANGES, status=CREATED, threads=UPLOADS)
def open_upload(call: Call[UploadBody, Nothing]) -> ExpertUpload:
    """Begin the upload of a package."""
    return call.services.uploads.open(call.principal.limited_with, call.body.files).shown()


@router.operation("GET", f"{_UPLOADS}/{{upload}}", roles=_CHANGES, threads=UPLOADS)
def retrieve_upload(call: Call[Nothing, Nothing]) -> ExpertUpload:
    """Show how much of an upload has arrived."""
    return _upload(call).shown()


@router.operation("PATCH", f"{_UPLOADS}/{{upload}}/{{file}}", roles=_CHANGES)
async def write_upload(call: Call[Unread, WriteQuery]) -> ExpertUpload:
    """Append the body to a file of the upload, at ?offset=."""
    upload = await run_in(UPLOADS, _upload, call)
    arriving = while_identified(call.request, call.services, call.request.stream())
    await call.services.uploads.write(upload, call.path["file"], call.query.offset, arriving)
    return await run_in(UPLOADS, upload.shown)


@router.operation("DELETE", f"{_UPLOADS}/{{upload}}", roles=_CHANGES, threads=REMOVALS)
def drop_upload(call: Call[Nothing, Nothing]) -> UploadDeleted:
    """Delete an upload."""
    upload = _upload(call)
    call.services.uploads.remove(upload)
    return UploadDeleted(id=upload.id)


def _upload(call: Call[Any, Any]) -> Upload:
    """The upload of the path, if it is the caller's own."""
    return call.services.uploads.get(call.path["upload"], call.principal.limited_with)


def _source(call: Call[AddBody, Nothing]) -> Path:
    """The folder of the package that a body names."""
    uploads, body = call.services.uploads, call.body
    if body.upload is None:
        return _under(call.services.experts_dir, body.package or "")
    return uploads.take(uploads.get(body.upload, call.principal.limited_with))


def _under(directory: Path | None, name: str) -> Path:
    if directory is None:
        raise Invalid(
            "This server has no --experts-dir to find packages in. Upload the package instead.",
            param="package",
            code="no_experts_dir",
        )
    path = directory / name
    if not path.is_dir():
        raise NotFound(f"There is no package '{name}' in --experts-dir.", code="package_not_found", param="package")
    return path


def _may_revoke(principal: Principal, snapshot: Snapshot, expert: str) -> bool:
    known = snapshot.experts.get(ExpertId(expert))
    if principal.role is Role.ADMIN:
        return True
    return known is not None and known.owner is not None and known.owner == principal.owner_id


def _unserved(call: Call[Nothing, RevokeQuery]) -> UnservedProjects | None:
    """Who is not served without the expert, by the policy as this process knows it once the expert is gone."""
    if call.principal.role is not Role.ADMIN:
        return None
    snapshot = call.services.policy.stored or call.snapshot
    projects = needing(snapshot, call.path["expert"], call.services.clock())
    return UnservedProjects(total=len(projects), ids=list(projects[:MOST_UNSERVED]))


def _unknown() -> NotFound:
    return NotFound("No expert of that name is loaded. GET /v1/experts lists the loaded ones.", code=UNKNOWN_EXPERT)


def _answer(error: ExpertError) -> ApiError:
    if isinstance(error, NotLoaded):
        return _unknown()
    if isinstance(error, NotStored):
        return Unavailable(str(error), code=error.code)
    kind = Conflict if isinstance(error, ChangeConflict) else ApiError
    return kind(str(error), code=error.code)


async def _events(states: AsyncIterator[ExpertJob]) -> AsyncIterator[str]:
    try:
        async for state in states:
            yield f"data: {state.model_dump_json()}\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
    yield DONE
