"""`POST /v1/experts`, `DELETE /v1/experts/{expert}`, jobs and uploads: what changes the loaded experts.

Administrators change every expert; owners their own, and learn of no other.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flexgate.policies.snapshot import Snapshot
from flexgate.policies.tenants import Role
from flexgate.policies.terms import ExpertId
from flexgate.server.auth import Principal
from flexgate.server.connections import EventStream
from flexgate.server.context import CHANGE_PATIENCE_S, identify, while_identified
from flexgate.server.errors import ApiError, Invalid, NotFound, Unavailable
from flexgate.server.experts.errors import ChangeConflict, ExpertError, NotResident, NotStored
from flexgate.server.experts.schemas import AddBody, JobQuery, RevokeQuery, UploadBody, WriteQuery
from flexgate.server.forms import parse_query, read_body
from flexgate.server.openai.sse import DONE
from flexgate.server.refusals import UNKNOWN_EXPERT
from flexgate.server.services import Services

CHANGES = (Role.ADMIN, Role.OWNER)
MOST_JOBS = 4


class ExpertChanges:
    """The routes."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._service = services.experts
        self._uploads = services.uploads
        self._packages = services.experts_dir

    async def add(self, request: Request) -> Response:
        """Begin to add an expert: 202 with a job."""
        principal, _ = await identify(request, self._services, CHANGES)
        body = await read_body(request, self._services, AddBody)
        if self._service.jobs.running(principal.key_id) >= MOST_JOBS:
            raise ApiError(
                f"{MOST_JOBS} jobs of this key are running. Wait for one of them.",
                status=HTTPStatus.CONFLICT,
                code="too_many_jobs",
            )
        actor, owner = principal.key_id, principal.owner_id
        if body.upload is not None:
            source = self._uploads.take(self._uploads.get(body.upload, actor))
            job = self._service.start_add(source, name=body.upload, actor=actor, owner=owner, move=True)
        else:
            if principal.role is Role.OWNER:
                raise Invalid("An owner's key adds packages by upload.", param="package", code="upload_required")
            source = self._under_experts_dir(body.package or "")
            job = self._service.start_add(source, name=source.name, actor=actor, owner=owner)
        location = {"location": f"/v1/expert_jobs/{job.id}"}
        return JSONResponse(job.to_json(), status_code=HTTPStatus.ACCEPTED, headers=location)

    async def job(self, request: Request) -> Response:
        """A job, or with ?stream=true all its states as they come."""
        principal, _ = await identify(request, self._services, (*CHANGES, Role.AUDITOR))
        query = parse_query(request.query_params.multi_items(), JobQuery)
        job = self._service.jobs.get(request.path_params["job"])
        if job is None or (principal.role is Role.OWNER and job.actor != principal.key_id):
            raise NotFound("There is no such job. The newest hundred are kept until a restart.", code="job_not_found")
        if query.stream:
            states = while_identified(request, self._services, job.watch())
            return EventStream(_events(states))
        return JSONResponse(job.to_json())

    async def revoke(self, request: Request) -> Response:
        """Withdraw an expert: 200 with the record, once nothing can come of it any more."""
        principal, snapshot = await identify(request, self._services, CHANGES, patience=CHANGE_PATIENCE_S)
        query = parse_query(request.query_params.multi_items(), RevokeQuery)
        expert = request.path_params["expert"]
        if not _may_withdraw(principal, snapshot, expert):
            raise _unknown()
        try:
            record = await self._service.revoke(expert, actor=principal.key_id, drain_seconds=query.drain_seconds)
        except ExpertError as error:
            raise _answer(error) from error
        return JSONResponse(record)

    async def open_upload(self, request: Request) -> Response:
        """Announce a package's files: 201 with the upload's id."""
        principal, _ = await identify(request, self._services, CHANGES)
        body = await read_body(request, self._services, UploadBody)
        upload = self._uploads.open(principal.key_id, body.files)
        return JSONResponse(upload.to_json(), status_code=HTTPStatus.CREATED)

    async def upload(self, request: Request) -> Response:
        """How much of each file has arrived."""
        principal, _ = await identify(request, self._services, CHANGES)
        return JSONResponse(self._uploads.get(request.path_params["upload"], principal.key_id).to_json())

    async def write_upload(self, request: Request) -> Response:
        """Append the body to a file, from ?offset= on."""
        principal, _ = await identify(request, self._services, CHANGES)
        offset = parse_query(request.query_params.multi_items(), WriteQuery).offset
        upload = self._uploads.get(request.path_params["upload"], principal.key_id)
        arriving = while_identified(request, self._services, request.stream())
        await self._uploads.write(upload, request.path_params["file"], offset, arriving)
        return JSONResponse(upload.to_json())

    async def drop_upload(self, request: Request) -> Response:
        """Forget an upload."""
        principal, _ = await identify(request, self._services, CHANGES)
        upload = self._uploads.get(request.path_params["upload"], principal.key_id)
        self._uploads.remove(upload)
        return JSONResponse({"id": upload.id, "object": "expert.upload", "deleted": True})

    def _under_experts_dir(self, name: str) -> Path:
        if self._packages is None:
            raise Invalid(
                "This server has no --experts-dir to find packages in. Upload the package instead.",
                param="package",
                code="no_experts_dir",
            )
        path = self._packages / name
        if not path.is_dir():
            raise NotFound(f"There is no package '{name}' in --experts-dir.", code="package_not_found", param="package")
        return path


def _may_withdraw(principal: Principal, snapshot: Snapshot, expert: str) -> bool:
    known = snapshot.experts.get(ExpertId(expert))
    if principal.role is Role.ADMIN:
        return True
    return known is not None and known.owner == principal.owner_id


def _unknown() -> NotFound:
    return NotFound("No expert of that name is loaded that could be withdrawn.", code=UNKNOWN_EXPERT)


def _answer(error: ExpertError) -> ApiError:
    if isinstance(error, NotResident):
        return _unknown()
    if isinstance(error, NotStored):
        return Unavailable(str(error), code=error.code)
    status = HTTPStatus.CONFLICT if isinstance(error, ChangeConflict) else HTTPStatus.INTERNAL_SERVER_ERROR
    return ApiError(str(error), status=status, code=error.code)


async def _events(states: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    try:
        async for state in states:
            yield f"data: {json.dumps(state)}\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
    yield DONE
