"""API keys: `sk-<id>-<secret>`, where the secret is 256 random bits in base64url.

Only the SHA-256 of the whole key is kept. A slow password hash is not needed: 256 random bits
cannot be guessed.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field
from typing import Final

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import ColumnElement, Connection, Row, select

from flexgate.policies.documents import KeyRecord
from flexgate.policies.store.documents import damaged
from flexgate.policies.store.schema import api_keys

_RECORD: Final = TypeAdapter(KeyRecord)


@dataclass(frozen=True, slots=True)
class MintedKey:
    """A new key. `secret` exists here only: show it once, keep it nowhere."""

    secret: str = field(repr=False)
    record: KeyRecord


def new_secret() -> tuple[str, str]:
    """The visible prefix and the whole key."""
    prefix = f"sk-{secrets.token_hex(4)}"
    return prefix, f"{prefix}-{secrets.token_urlsafe(32)}"


def digest(secret: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(secret.encode()).digest()


def read_keys(connection: Connection, *where: ColumnElement[bool]) -> list[KeyRecord]:
    """The records of the keys of which all of `where` holds, oldest first; raises `StoreDamaged`."""
    query = select(api_keys).where(*where).order_by(api_keys.c.created, api_keys.c.id)
    return [key_from_row(row) for row in connection.execute(query)]


def key_from_row(row: Row[tuple[object, ...]]) -> KeyRecord:
    """A row of `api_keys` as a record; raises `StoreDamaged`."""
    values = {**row._mapping}
    try:
        return _RECORD.validate_python({**values, "key_id": values["id"]})
    except ValidationError as error:
        raise damaged("key", values, error) from error
