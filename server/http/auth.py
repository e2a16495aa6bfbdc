"""Identify callers: the `Authorization` header against the keys of the in-memory snapshot; and a request's context.

    Unauthenticated          401, one code
    ├── KeyMissing           no header, or no bearer key in it
    ├── KeyWrong             no such key, or its project is archived
    ├── KeyRevoked
    └── KeyExpired
    WrongRole                403, a good key used for what it is not for

Keys are found by their SHA-256. Every call makes exactly one constant-time comparison, on a miss
against a digest that no key has, so that a hit and a miss do the same work.
"""

from __future__ import annotations

import hashlib
import hmac
import resource
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from starlette.requests import Request

from flexgate.policies.documents import KeyRecord, Role
from flexgate.policies.errors import PolicyError
from flexgate.policies.ids import OwnerId, TenantId
from flexgate.policies.snapshot import Snapshot
from flexgate.server.http.connections import KNOWN
from flexgate.server.http.errors import ApiError, Forbidden, TooMany, Unauthorized
from flexgate.server.http.refusals import from_policy

if TYPE_CHECKING:
    from flexgate.server.policy.live import LivePolicy

MAX_HEADER_CHARACTERS: Final = 512
WRONG_KEY: Final = "The API key is not valid. Check the key, or ask an administrator for one."
EVERY_ROLE: Final = frozenset(Role)
INVALID_API_KEY: Final = "invalid_api_key"
BEARER: Final = {"www-authenticate": "Bearer"}
STATE: Final = "flexgate"
"""The scope's key of a request's `Context`."""
CHANGE_PATIENCE_S: Final = 10.0
"""How long a change of the policy or a revocation waits for a confirmed policy, on a busy machine."""
NO_KEY: Final = bytes(32)
MOST_IN_PROGRESS: Final = 1024
"""Requests of one project or owner; a quarter of the process's descriptors where these are few."""
_COUNTED: Final = frozenset({Role.TENANT, Role.OWNER})
T = TypeVar("T")


class Unauthenticated(Unauthorized):
    """401: it is not known who calls."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=INVALID_API_KEY, headers=BEARER)


class KeyMissing(Unauthenticated):
    """The request carries no bearer key."""


class KeyWrong(Unauthenticated):
    """No key like this is valid here."""


class KeyRevoked(Unauthenticated):
    """The key was revoked."""


class KeyExpired(Unauthenticated):
    """The key is past its expiry."""


class WrongRole(Forbidden):
    """403: the key is good, but not for this."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="wrong_key_role")


class InProgress:
    """How many requests of each caller are in progress, by `Principal.limited_with`: others have connections left."""

    def __init__(self) -> None:
        self._most = min(MOST_IN_PROGRESS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._of: Counter[str] = Counter()

    def enter(self, caller: str) -> None:
        """Count one more request; `leave` must follow. Raises `ApiError` (429) if the caller has as many as it may."""
        if self._of[caller] >= self._most:
            raise _too_many(self._most)
        self._of[caller] += 1

    def leave(self, caller: str) -> None:
        """Count one request less."""
        self._of[caller] -= 1
        if not self._of[caller]:
            del self._of[caller]


def _too_many(most: int) -> ApiError:
    return TooMany(
        f"{most} requests of this project or owner are in progress, which is the limit. "
        "Try again when one has finished.",
        code="rate_limit_exceeded",
        type_="requests",
        headers={"retry-after": "1"},
    )


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller. `tenant_id` is set exactly for `Role.TENANT`, `owner_id` for `Role.OWNER`.

    `digest` is the key's SHA-256, by which a snapshot finds it; `expires` is Unix seconds. `limited_with` is what all
    callers that share bounds have in common: their project or owner, else the key.
    """

    key_id: str
    role: Role
    tenant_id: TenantId | None
    owner_id: OwnerId | None
    digest: bytes = field(default=b"", repr=False, compare=False)
    expires: float | None = field(default=None, compare=False)
    limited_with: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Derive `limited_with`."""
        owner = self.key_id if self.owner_id is None else f"owner {self.owner_id}"
        object.__setattr__(self, "limited_with", self.tenant_id or owner)


@dataclass(slots=True)
class Context:
    """What is known of a request so far. The outermost layer keeps it in the request's scope, and logs it at the end.

    Attributes:
        roles: the roles whose keys are valid at the address where the request came in.
        counted: for which caller `in_progress` counts it; for none before its key is known, and for no operator.
        body_sha256: of its body, once that is read.
        elsewhere: why it is denied, for a valid key that was refused because it belongs at the other address.
        error: what the response says, if it is an error.
        disconnected: whether the client left before the response began.
        over: told the response's status once it has been sent, or its client has left.
    """

    request_id: str
    roles: Collection[Role] = EVERY_ROLE
    in_progress: InProgress = field(default_factory=InProgress)
    counted: str | None = None
    principal: Principal | None = None
    decision_id: str | None = None
    policy_version: int | None = None
    body_sha256: str | None = None
    elsewhere: str | None = None
    error: ApiError | None = None
    disconnected: bool = False
    over: Callable[[int], None] | None = None

    def count(self) -> None:
        """Count a tenant's or an owner's request until `leave`; raises `ApiError` (429) if it has too many."""
        if self.principal is not None and self.principal.role in _COUNTED and self.counted is None:
            self.in_progress.enter(self.principal.limited_with)
            self.counted = self.principal.limited_with

    def leave(self) -> None:
        """The request is over."""
        if self.counted is not None:
            self.in_progress.leave(self.counted)
            self.counted = None

    @property
    def code(self) -> str | None:
        """Why there is no good response, if there is none."""
        return "client_disconnected" if self.disconnected else None if self.error is None else self.error.code

    def log_fields(self) -> dict[str, Any]:
        """What the request's log line says, apart from its response."""
        fields: dict[str, Any] = {}
        if self.principal is not None:
            fields |= {"key": self.principal.key_id, "tenant": self.principal.tenant_id}
        if self.decision_id is not None:
            fields |= {"decision": self.decision_id, "policy_version": self.policy_version}
        if self.elsewhere is not None:
            fields["elsewhere"] = self.elsewhere
        if self.disconnected or self.error is not None:
            fields["code"] = self.code
        return fields


def context_of(request: Request) -> Context:
    """The context of a request."""
    context: Context = request.scope[STATE]
    return context


class Callers(Protocol):
    """What callers are identified by: the live policy, and the clock by which keys expire."""

    @property
    def policy(self) -> LivePolicy: ...
    @property
    def clock(self) -> Callable[[], float]: ...


async def identify(
    request: Request, services: Callers, roles: Collection[Role] = EVERY_ROLE, *, patience: float | None = None
) -> tuple[Principal, Snapshot]:
    """The caller by its key, which must have one of `roles`, and the snapshot that knows it; raises `ApiError`.

    `patience` is in seconds; see `LivePolicy.current`.
    """
    context = context_of(request)
    snapshot = await current_snapshot(services, patience)
    header = request.headers.get("authorization")
    context.principal = authenticate(snapshot, header, services.clock(), context.roles)
    require_role(context.principal, *roles)
    context.count()
    request.scope[KNOWN] = True
    return context.principal, snapshot


async def current_snapshot(services: Callers, patience: float | None = None) -> Snapshot:
    """The confirmed policy; raises `ApiError` (503) without one."""
    try:
        return await services.policy.current(patience)
    except PolicyError as error:
        raise from_policy(error) from error


def authenticate(
    snapshot: Snapshot, authorization_header: str | None, now: float, roles: Collection[Role] = EVERY_ROLE
) -> Principal:
    """The principal behind `Authorization: Bearer sk-…`; raises `Unauthenticated`.

    `now` is Unix seconds. A key of another role than `roles` is like no key. Nothing of the key
    appears in the error.
    """
    key = _bearer(authorization_header)
    return recognise(snapshot, hashlib.sha256(key.encode(errors="surrogatepass")).digest(), now, roles)


def recognise(snapshot: Snapshot, digest: bytes, now: float, roles: Collection[Role] = EVERY_ROLE) -> Principal:
    """The principal behind a key's SHA-256, as `authenticate`; raises `Unauthenticated`."""
    found = snapshot.keys.get(digest)
    equal = hmac.compare_digest(digest, NO_KEY if found is None else found.sha256)
    if found is None or not equal or found.role not in roles or _archived(snapshot, found):
        raise KeyWrong(WRONG_KEY)
    if found.revoked is not None:  # whatever the time: the process that revoked it may have another clock
        raise KeyRevoked("The API key was revoked. Use another key.")
    if found.expires is not None and found.expires <= now:
        raise KeyExpired("The API key has expired. Use another key.")
    return Principal(found.key_id, found.role, found.tenant_id, found.owner_id, digest, found.expires)


def require_tenant(principal: Principal) -> TenantId:
    """The tenant whose key this is; raises `WrongRole` for an operator's key."""
    if principal.tenant_id is None:
        raise WrongRole(f"A key with the role '{principal.role}' cannot be used for inference. Use a tenant's key.")
    return principal.tenant_id


def require_role(principal: Principal, *roles: Role) -> None:
    """Refuse a key whose role is not among `roles`; raises `WrongRole`."""
    if principal.role not in roles:
        wanted = " or ".join(f"'{role}'" for role in roles)
        raise WrongRole(
            f"A key with the role '{principal.role}' cannot use this route. Use a key with the role {wanted}."
        )


def _bearer(header: str | None) -> str:
    if not header:
        raise KeyMissing("No API key was given. Send 'Authorization: Bearer sk-…'.")
    scheme, _, key = header.partition(" ")
    if scheme.lower() != "bearer" or not key.strip() or len(header) > MAX_HEADER_CHARACTERS:
        raise KeyMissing("The Authorization header is not valid. Send 'Authorization: Bearer sk-…'.")
    return key.strip()


def _archived(snapshot: Snapshot, key: KeyRecord) -> bool:
    return key.tenant_id is not None and snapshot.tenants[key.tenant_id].archived
