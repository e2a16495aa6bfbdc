"""Who calls: an `Authorization` header against the keys of the in-memory snapshot.

    AuthError
    ├── Unauthenticated      (401)
    │   ├── KeyMissing       no header, or no bearer key in it
    │   ├── KeyWrong         no such key, or its project is archived
    │   ├── KeyRevoked
    │   └── KeyExpired
    └── WrongRole            (403) a good key used for what it is not for

Keys are found by their SHA-256. Every call makes exactly one constant-time comparison, on a miss
against a digest that no key has, so that a hit and a miss do the same work.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from flexgate.policies.documents import KeyRecord, Role
from flexgate.policies.ids import OwnerId, TenantId
from flexgate.policies.snapshot import Snapshot

MAX_HEADER_CHARACTERS: Final = 512
WRONG_KEY: Final = "The API key is not valid. Check the key, or ask an administrator for one."
EVERY_ROLE: Final = frozenset(Role)
_NO_KEY: Final = bytes(32)


class AuthError(Exception):
    """Root of authentication and authorisation errors. `str(error)` is for the caller."""


class Unauthenticated(AuthError):
    """It is not known who calls."""


class KeyMissing(Unauthenticated):
    """The request carries no bearer key."""


class KeyWrong(Unauthenticated):
    """No key like this is valid here."""


class KeyRevoked(Unauthenticated):
    """The key was revoked."""


class KeyExpired(Unauthenticated):
    """The key is past its expiry."""


class WrongRole(AuthError):
    """The key is good, but not for this."""


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller. `tenant_id` is set exactly for `Role.TENANT`, `owner_id` for `Role.OWNER`.

    `digest` is the key's SHA-256, by which a snapshot finds it; `expires` is Unix seconds.
    """

    key_id: str
    role: Role
    tenant_id: TenantId | None
    owner_id: OwnerId | None
    digest: bytes = field(default=b"", repr=False, compare=False)
    expires: float | None = field(default=None, compare=False)


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
    equal = hmac.compare_digest(digest, _NO_KEY if found is None else found.sha256)
    if found is None or not equal or found.role not in roles or _archived(snapshot, found):
        raise KeyWrong(WRONG_KEY)
    if found.revoked is not None:  # whatever the time: whoever revoked it may have another clock
        raise KeyRevoked("The API key was revoked. Use another key of the project.")
    if found.expires is not None and found.expires <= now:
        raise KeyExpired("The API key has expired. Use another key of the project.")
    return Principal(found.key_id, found.role, found.tenant_id, found.owner_id, digest, found.expires)


def require_tenant(principal: Principal) -> TenantId:
    """The tenant that may infer with this key; raises `WrongRole`."""
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
