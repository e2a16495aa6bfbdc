"""One administrative operation: who may do it, what it takes, and the function that does it.

An operation's function is plain: it gets a `Call` and returns JSON, in a thread, because the store blocks; or it is a
coroutine, for what happens on the event loop. What it raises becomes an answer here. Roles are checked before anything
is looked up, so that a key of another role learns nothing about what exists.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flexgate.policies.documents import Role
from flexgate.policies.errors import PolicyError, StoreUnavailable
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.store.store import Store
from flexgate.policies.withhold import Withholding
from flexgate.server.admin.concurrency_limit import in_turn
from flexgate.server.http.auth import Principal
from flexgate.server.http.context import CHANGE_PATIENCE_S, identify
from flexgate.server.http.errors import ApiError, Unavailable
from flexgate.server.http.refusals import from_change, not_found
from flexgate.server.http.responses import OK
from flexgate.server.http.validation import Bodies, Closed, read_body, read_query
from flexgate.server.policy.decision_samples import DecisionSamples
from flexgate.server.policy.executors import CHANGES, run_in
from flexgate.server.policy.unstored import Unstored

if TYPE_CHECKING:
    from flexgate.server.engine.frontend.client import GatedEngineClient
    from flexgate.server.experts.service import ExpertService
    from flexgate.server.experts.uploads import Uploads


Json = dict[str, Any]
_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,80}")
logger = logging.getLogger(__name__)


class AdminServices(Bodies, Protocol):
    """What operations of the administration work with."""

    @property
    def store(self) -> Store: ...
    @property
    def unstored(self) -> Unstored: ...
    @property
    def samples(self) -> DecisionSamples: ...
    @property
    def model_names(self) -> tuple[str, ...]: ...
    @property
    def client(self) -> GatedEngineClient: ...
    @property
    def experts(self) -> ExpertService: ...
    @property
    def uploads(self) -> Uploads: ...
    @property
    def experts_dir(self) -> Path | None: ...


class Nothing(Closed):
    """No fields."""


_NOTHING: Final[Any] = Nothing  # for generic defaults


class Written(Closed):
    """What every write may ask: `all` answers once every process enforces the change."""

    wait: Literal["all"] | None = None


class Page(Closed):
    """A part of a list: `limit` objects that come after the one with the id `after`."""

    after: str | None = None
    limit: int = Field(20, ge=1, le=100)


B = TypeVar("B", bound=BaseModel)
Q = TypeVar("Q", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Call(Generic[B, Q]):
    """One call of an operation. `now` is Unix seconds; `path` holds the path's parameters."""

    services: AdminServices
    principal: Principal
    snapshot: Snapshot
    path: dict[str, str]
    query: Q
    body: B
    now: float
    request: Request

    @property
    def store(self) -> Store:
        """The policy store."""
        return self.services.store

    @property
    def attributed(self) -> dict[str, Any]:
        """What a change is attributed to."""
        return {"actor": self.principal.key_id, "at": self.now}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation(Generic[B, Q]):
    """A route of the administration. `work`'s docstring is its description.

    `patient` waits for a confirmed policy under load, as every write does. `withholds` names what a call takes away:
    that is enforced at once, also where the store cannot take the change.
    """

    method: Literal["GET", "POST", "PATCH", "DELETE"]
    path: str
    roles: tuple[Role, ...]
    work: Callable[[Call[B, Q]], Json | Awaitable[Json | Response]]
    status: int = OK
    patient: bool = False
    body: type[B] = _NOTHING
    query: type[Q] = _NOTHING
    withholds: Callable[[Call[B, Q]], Withholding] | None = None

    @property
    def writes(self) -> bool:
        """Whether it changes the policy."""
        return issubclass(self.query, Written)


class Administration:
    """The endpoint of an operation."""

    def __init__(self, services: AdminServices, operation: Operation[Any, Any]) -> None:
        self._services = services
        self._operation = operation

    async def answer(self, request: Request) -> Response:
        """Authenticate, authorise, check, do, and wait until the change is enforced."""
        operation, services = self._operation, self._services
        patience = CHANGE_PATIENCE_S if operation.writes or operation.patient else None
        principal, snapshot = await identify(request, services, operation.roles, patience=patience)
        if not all(_ID.fullmatch(value) for value in request.path_params.values()):
            raise not_found()
        query = read_query(request, operation.query)
        body = Nothing() if operation.body is Nothing else await read_body(request, services, operation.body)
        call = Call(services, principal, snapshot, dict(request.path_params), query, body, services.clock(), request)
        try:
            if inspect.iscoroutinefunction(operation.work):
                result = await operation.work(call)
            else:
                result, snapshot = await in_turn(principal, operation.writes, self._work, call)
        except PolicyError as error:
            if operation.withholds is not None and isinstance(error, StoreUnavailable):
                raise await self._withheld(operation.withholds(call), call) from error
            refusal = from_change(error)
            if isinstance(refusal, Unavailable):
                logger.error("the policy store cannot be used: %s", error)
            raise refusal from error
        if isinstance(result, Response):
            return result
        if isinstance(query, Written) and query.wait == "all":
            await self._everywhere(snapshot)
        version = str(snapshot.policy_version)
        return JSONResponse(result, operation.status, headers={"x-flexgate-policy-version": version})

    async def _withheld(self, withholding: Withholding, call: Call[Any, Any]) -> ApiError:
        """Enforce a revocation that could not be stored, until it is; the answer says so."""
        what = f"{self._operation.method} {self._operation.path} {call.path}"
        store = partial(self._operation.work, call)
        await run_in(CHANGES, self._services.unstored.add, what, withholding, store)
        return Unavailable(
            "The change could not be stored in the policy database. This server enforces the revocation and keeps "
            "trying to store it. Until then other servers allow what it takes away, and so would a restart of this "
            "one: repair the database first.",
            code="change_not_stored",
        )

    def _work(self, call: Call[Any, Any]) -> tuple[Json, Snapshot]:
        """The result, and the snapshot that it is from: a changed one, once this process enforces it. Blocks."""
        result: Any = self._operation.work(call)
        if not self._operation.writes:
            return result, call.snapshot
        try:
            return result, self._services.policy.confirm()
        except PolicyError as error:
            raise _not_confirmed() from error

    async def _everywhere(self, snapshot: Snapshot) -> None:
        try:
            await self._services.policy.everywhere(snapshot.policy_version)
        except PolicyError as error:
            raise _not_confirmed() from error


def _not_confirmed() -> Unavailable:
    return Unavailable(
        "The change is stored, but not confirmed to be in force on all servers. Do not repeat it; check that they run.",
        code="change_not_confirmed",
    )
