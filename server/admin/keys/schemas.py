"""Keys and service accounts as OpenAI's clients know them. A key's value is shown once."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from flexgate.policies.documents import KeyRecord, Title
from flexgate.policies.ids import OwnerIdField
from flexgate.policies.store.accounts import ServiceAccount
from flexgate.policies.store.keys import MintedKey
from flexgate.server.admin.operation import Json, Page
from flexgate.server.http.validation import Closed

Seconds = Annotated[int, Field(ge=1, le=10 * 365 * 86_400)]


def _boolean(value: Any) -> Any:
    if not isinstance(value, bool):  # to a Literal, 0 is False
        raise ValueError("Input should be a valid boolean")
    return value


class CreateServiceAccount(Closed):
    """A new account comes with its one key."""

    name: Title
    expires_in_seconds: Seconds | None = None
    create_service_account_only: Annotated[Literal[False], BeforeValidator(_boolean)] | None = None


class CreateAdminKey(Closed):
    """OpenAI's fields, and ours: whose key it is. An owner's key names the owner."""

    name: Title
    expires_in_seconds: Seconds | None = None
    role: Literal["admin", "auditor", "owner"] = "admin"
    owner_id: OwnerIdField | None = None


class ListApiKeys(Page):
    """All keys of a project are its service accounts'; those are always active."""

    owner_project_access: Literal["active", "any"] | None = None


class ListAdminKeys(Page):
    """By time of creation."""

    order: Literal["asc", "desc"] = "asc"


def expiry(seconds: int | None, now: float) -> float | None:
    """Unix seconds at which a key ends."""
    return None if seconds is None else now + seconds


def account_object(account: ServiceAccount) -> Json:
    """A service account."""
    return {
        "id": account.id,
        "object": "organization.project.service_account",
        "name": account.name,
        "role": "member",
        "created_at": int(account.key.created),
    }


def new_account_object(account: ServiceAccount, minted: MintedKey) -> Json:
    """A service account with its key's value, which is shown here only."""
    key = {
        "id": minted.record.key_id,
        "object": "organization.project.service_account.api_key",
        "name": minted.record.name,
        "value": minted.secret,
        "created_at": int(minted.record.created),
        "expires_at": _whole(minted.record.expires),
    }
    return {**account_object(account), "api_key": key}


def api_key_object(key: KeyRecord) -> Json:
    """A project's key."""
    account = account_object(ServiceAccount(key))
    del account["object"]
    return {
        "id": key.key_id,
        "object": "organization.project.api_key",
        "name": key.name,
        "redacted_value": redacted(key),
        "created_at": int(key.created),
        "expires_at": _whole(key.expires),
        "last_used_at": None,
        "owner": {"type": "service_account", "service_account": account},
        "owner_project_access": "active",
    }


def admin_key_object(key: KeyRecord) -> Json:
    """A key of an administrator, an auditor or an owner."""
    return {
        "id": key.key_id,
        "object": "organization.admin_api_key",
        "name": key.name,
        "redacted_value": redacted(key),
        "created_at": int(key.created),
        "expires_at": _whole(key.expires),
        "last_used_at": None,
        "owner": {
            "id": key.owner_id or key.key_id,
            "object": "organization.service_account",
            "type": "service_account",
            "name": key.name,
            "created_at": int(key.created),
            "role": str(key.role),
        },
    }


def redacted(key: KeyRecord) -> str:
    """The part of a key that may be shown."""
    return f"{key.prefix}-..." if len(key.prefix) == 11 else f"{key.prefix[:6]}..."


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
