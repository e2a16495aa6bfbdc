"""One administrative operation: who may do it, what it takes, and the function that does it.

An operation's function is plain: it gets a `Call` and returns the response's model, or a whole response, in a thread,
because the store blocks; or it is a coroutine, for what happens on the event loop. Roles are checked before anything is
looked up, so that a key of another role learns nothing about what exists.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from flexgate.policies.documents import Role
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.store.store import Store
from flexgate.policies.withhold import Withholding
from flexgate.server.http.auth import Principal
from flexgate.server.http.body import Bodies
from flexgate.server.http.connections import EventStream
from flexgate.server.http.responses import OK
from flexgate.server.http.validation import Closed
from flexgate.server.ledger.journal import Journal
from flexgate.server.ledger.reading import Source
from flexgate.server.ledger.receipts.service import Receipts
from flexgate.server.policy.decision_samples import DecisionSamples
from flexgate.server.policy.source import PolicySource
from flexgate.server.policy.unstored import Unstored

if TYPE_CHECKING:
    from flexgate.server.engine.frontend.client import GatedEngineClient
    from flexgate.server.experts.service import ExpertService
    from flexgate.server.experts.uploads import Uploads

Json = dict[str, Any]
Method = Literal["GET", "POST", "PATCH", "DELETE"]


class AdminServices(Bodies, Protocol):
    """What operations of the administration work with."""

    @property
    def policy(self) -> PolicySource: ...
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
    @property
    def receipts(self) -> Receipts: ...
    @property
    def usage(self) -> Source: ...
    @property
    def ledger(self) -> Journal: ...
    @property
    def draining(self) -> bool: ...


class Nothing(Closed):
    """No fields."""


class Unread(Closed):
    """A body that the operation reads itself, as it arrives."""


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
    """One call of an operation. `now` is Unix seconds, `path` the path's parameters, `headers` the response's."""

    services: AdminServices
    principal: Principal
    snapshot: Snapshot
    path: dict[str, str]
    query: Q
    body: B
    now: float
    request: Request
    headers: dict[str, str] = field(default_factory=dict)

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
    """What a route of the administration does, and for whom.

    `patient` waits for a confirmed policy under load, as every write does. `withholds` names what a call takes away:
    that is enforced at once, also where the store cannot take the change. `threads` are those it happens in; by default
    those in which the store is asked for its caller.
    """

    method: Method
    path: str
    roles: tuple[Role, ...]
    work: Callable[[Call[B, Q]], Any]
    body: type[B]
    query: type[Q]
    returns: Any
    status: int = OK
    patient: bool = False
    withholds: Callable[[Call[B, Q]], Withholding] | None = None
    threads: ThreadPoolExecutor | None = None

    @classmethod
    def of(cls, work: Callable[[Call[B, Q]], Any], **declared: Any) -> Self:
        """Of a function whose annotations name its body, query and response."""
        types = inspect.get_annotations(work, eval_str=True)
        body, query = get_args(types["call"])
        return cls(**{"work": work, "body": body, "query": query, "returns": types["return"]} | declared)

    @property
    def response(self) -> Any:
        """The response's model."""
        kinds = [kind for kind in self._kinds if not (isinstance(kind, type) and issubclass(kind, Response))]
        return functools.reduce(operator.or_, kinds)

    @property
    def events(self) -> Any:
        """The model of what it may send as events, if it may."""
        return self.response if EventStream in self._kinds else None

    @property
    def _kinds(self) -> tuple[Any, ...]:
        return get_args(self.returns) if get_origin(self.returns) is UnionType else (self.returns,)

    @property
    def summary(self) -> str:
        """The first line of the function's description."""
        return (self.work.__doc__ or "").strip().partition("\n")[0]

    @property
    def writes(self) -> bool:
        """Whether it changes the policy."""
        return issubclass(self.query, Written)

    @property
    def on_loop(self) -> bool:
        """Whether it happens on the event loop."""
        return inspect.iscoroutinefunction(self.work)
