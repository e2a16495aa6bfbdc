"""`POST /v1/experts`, `DELETE /v1/experts/{expert}`, jobs and uploads: what changes the loaded experts.

Administrators change every expert; owners their own, and learn of no other.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

from starlette.responses import Response

from flexgate.policies.documents import Role
from flexgate.policies.ids import ExpertId
from flexgate.policies.snapshot import Snapshot
from flexgate.server.admin.operation import Call, Json, Nothing, Operation
from flexgate.server.experts.errors import ChangeConflict, ExpertError, NotLoaded, NotStored
from flexgate.server.experts.schemas import AddBody, JobQuery, RevokeQuery, UploadBody, WriteQuery
from flexgate.server.experts.uploads import Upload
from flexgate.server.http.auth import Principal
from flexgate.server.http.connections import EventStream
from flexgate.server.http.context import while_identified
from flexgate.server.http.errors import ApiError, Conflict, Invalid, NotFound, Unavailable
from flexgate.server.http.refusals import UNKNOWN_EXPERT
from flexgate.server.http.responses import ACCEPTED, CREATED, accepted
from flexgate.server.inference.openai.sse import DONE

MOST_JOBS = 4
_READ_ALL: Final = (Role.ADMIN, Role.AUDITOR)


async def add(call: Call[AddBody, Nothing]) -> Response:
    """Add an expert to the running engine, as a job."""
    services, principal, body = call.services, call.principal, call.body
    service, uploads = services.experts, services.uploads
    if service.jobs.running(principal.key_id) >= MOST_JOBS:
        raise Conflict(
            f"{MOST_JOBS} jobs of this key are running. Wait for one of them.",
            code="too_many_jobs",
        )
    actor, owner = principal.key_id, principal.owner_id
    if body.upload is not None:
        source = uploads.take(uploads.get(body.upload, actor))
        job = service.start_add(source, name=body.upload, actor=actor, owner=owner, move=True)
    else:
        if principal.role is not Role.ADMIN:
            raise Invalid("An owner's key adds packages by upload.", param="package", code="upload_required")
        source = _under(services.experts_dir, body.package or "")
        job = service.start_add(source, name=source.name, actor=actor, owner=owner)
    return accepted(job.to_json(), f"/v1/expert_jobs/{job.id}")


async def job(call: Call[Nothing, JobQuery]) -> Json | Response:
    """How far a job is; with ?stream=true all its states as they come."""
    principal, found = call.principal, call.services.experts.jobs.get(call.path["job"])
    if found is None or (principal.role not in _READ_ALL and found.actor != principal.key_id):
        raise NotFound("There is no such job. The newest hundred are kept until a restart.", code="job_not_found")
    if call.query.stream:
        states = while_identified(call.request, call.services, found.watch())
        return EventStream(_events(states))
    return found.to_json()


async def revoke(call: Call[Nothing, RevokeQuery]) -> Json:
    """Revoke an expert from the running engine; answered once nothing can come of it any more."""
    principal, expert = call.principal, call.path["expert"]
    if not _may_revoke(principal, call.snapshot, expert):
        raise _unknown()
    try:
        return await call.services.experts.revoke(
            expert, actor=principal.key_id, drain_seconds=call.query.drain_seconds
        )
    except ExpertError as error:
        raise _answer(error) from error


async def open_upload(call: Call[UploadBody, Nothing]) -> Json:
    """Begin to upload a package."""
    return call.services.uploads.open(call.principal.key_id, call.body.files).to_json()


async def retrieve_upload(call: Call[Nothing, Nothing]) -> Json:
    """How much of an upload has arrived."""
    return _upload(call).to_json()


async def write_upload(call: Call[Nothing, WriteQuery]) -> Json:
    """Send a part of a file: the body is appended, from ?offset= on."""
    upload = _upload(call)
    arriving = while_identified(call.request, call.services, call.request.stream())
    await call.services.uploads.write(upload, call.path["file"], call.query.offset, arriving)
    return upload.to_json()


async def drop_upload(call: Call[Nothing, Nothing]) -> Json:
    """Give an upload up."""
    upload = _upload(call)
    call.services.uploads.remove(upload)
    return {"id": upload.id, "object": "expert.upload", "deleted": True}


def _upload(call: Call[Any, Any]) -> Upload:
    """The upload of the path, if it is the caller's own."""
    return call.services.uploads.get(call.path["upload"], call.principal.key_id)


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
    return known is not None and known.owner == principal.owner_id


def _unknown() -> NotFound:
    return NotFound("No expert of that name is loaded. GET /v1/experts lists the loaded ones.", code=UNKNOWN_EXPERT)


def _answer(error: ExpertError) -> ApiError:
    if isinstance(error, NotLoaded):
        return _unknown()
    if isinstance(error, NotStored):
        return Unavailable(str(error), code=error.code)
    kind = Conflict if isinstance(error, ChangeConflict) else ApiError
    return kind(str(error), code=error.code)


async def _events(states: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    try:
        async for state in states:
            yield f"data: {json.dumps(state)}\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
    yield DONE


_CHANGES: Final = (Role.ADMIN, Role.OWNER)
_UPLOADS: Final = "/v1/expert_uploads"
OPERATIONS: Final[tuple[Operation[Any, Any], ...]] = (
    Operation(method="POST", path="/v1/experts", roles=_CHANGES, work=add, body=AddBody, status=ACCEPTED),
    Operation(
        method="DELETE", path="/v1/experts/{expert}", roles=_CHANGES, work=revoke, query=RevokeQuery, patient=True
    ),
    Operation(method="GET", path="/v1/expert_jobs/{job}", roles=(*_CHANGES, Role.AUDITOR), work=job, query=JobQuery),
    Operation(method="POST", path=_UPLOADS, roles=_CHANGES, work=open_upload, body=UploadBody, status=CREATED),
    Operation(method="GET", path=f"{_UPLOADS}/{{upload}}", roles=_CHANGES, work=retrieve_upload),
    Operation(method="DELETE", path=f"{_UPLOADS}/{{upload}}", roles=_CHANGES, work=drop_upload),
    Operation(
        method="PATCH", path=f"{_UPLOADS}/{{upload}}/{{file}}", roles=_CHANGES, work=write_upload, query=WriteQuery
    ),
)
