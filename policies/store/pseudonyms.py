"""Pseudonyms of tenants for owners: opaque, and different for each owner."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import Final

from sqlalchemy import Engine, select

from flexgate.policies.errors import StoreDamaged
from flexgate.policies.store.database import reading
from flexgate.policies.store.schema import installation

_PREFIX: Final = "anon-"


class Pseudonyms:
    """One owner's names for tenants, the same in every process."""

    def __init__(self, key: bytes, owner_id: str) -> None:
        self._key = key
        self._owner_id = owner_id

    def of(self, tenant_id: str) -> str:
        """The tenant's name."""
        message = f"{len(self._owner_id)}:{self._owner_id}:{tenant_id}".encode()
        return _PREFIX + hmac.new(self._key, message, hashlib.sha256).hexdigest()[:20]

    def resolve(self, name: str, tenant_ids: Iterable[str]) -> str | None:
        """The tenant of that pseudonym. A tenant's own id is refused, so that guessing ids reveals none."""
        return next((id_ for id_ in tenant_ids if self.of(id_) == name), None)


def read_pseudonyms(engine: Engine, owner_id: str) -> Pseudonyms:
    """The names for one owner."""
    return Pseudonyms(read_pseudonym_key(engine), owner_id)


def read_pseudonym_key(engine: Engine) -> bytes:
    """What the names for all owners are made with; it never changes."""
    query = select(installation.c.value).where(installation.c.name == "pseudonym_key")
    with reading(engine) as connection:
        key = connection.scalar(query)
    if key is None:
        raise StoreDamaged("the policy database has no pseudonym key: restore a backup")
    return bytes(key)
