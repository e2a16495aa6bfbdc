"""Keys and service accounts as OpenAI's clients know them. A key's value is shown once."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticKnownError

from flexgate.policies.agreements import Line
from flexgate.policies.documents import KeyRecord
from flexgate.policies.ids import OwnerIdField
from flexgate.policies.store.accounts import ServiceAccount
from flexgate.policies.store.keys import MintedKey
from flexgate.server.admin.operation import Page
from flexgate.server.admin.pages import Deleted, Identified, PageOf
from flexgate.server.http.schemas import Shown
from flexgate.server.http.validation import Closed

Seconds = Annotated[int, Field(ge=1, le=10 * 365 * 86_400)]


def _boolean(value: Any) -> Any:
    if not isinstance(value, bool):  # to a Literal, 0 is False
        raise PydanticKnownError("bool_type")
    return value


class CreateServiceAccount(Closed):
    """A new account comes with its one key."""

    name: Line
    expires_in_seconds: Seconds | None = None
    create_service_account_only: Annotated[Literal[False], BeforeValidator(_boolean)] | None = None


class CreateAdminKey(Closed):
    """A name, and the key's role; the role `owner` needs `owner_id`."""

    name: Line
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


class AccountFields(Identified):
    """A project's robot user, and that it is one of the project's members."""

    name: str
    role: Literal["member"] = "member"
    created_at: int


class ServiceAccountObject(AccountFields):
    """A service account."""

    object: Literal["organization.project.service_account"] = "organization.project.service_account"


class ServiceAccountPage(PageOf[ServiceAccountObject]):
    """A part of the list of a project's service accounts."""


class NewKey(Identified):
    """A key with its value, which is shown here only."""

    object: Literal["organization.project.service_account.api_key"] = "organization.project.service_account.api_key"
    name: str
    value: str
    created_at: int
    expires_at: int | None


class NewServiceAccount(ServiceAccountObject):
    """A service account with its one key."""

    api_key: NewKey


class KeyOwner(Shown):
    """Whose a project's key is."""

    type: Literal["service_account"] = "service_account"
    service_account: AccountFields


class KeyObject(Identified):
    """A key, without its value."""

    name: str
    redacted_value: str
    created_at: int
    expires_at: int | None
    last_used_at: None = None


class ApiKeyObject(KeyObject):
    """A project's key."""

    object: Literal["organization.project.api_key"] = "organization.project.api_key"
    owner: KeyOwner
    owner_project_access: Literal["active"] = "active"


class ApiKeyPage(PageOf[ApiKeyObject]):
    """A part of the list of a project's keys."""


class AdminKeyOwner(Identified):
    """Whom a key speaks for: the owner that it is for, or itself."""

    object: Literal["organization.service_account"] = "organization.service_account"
    type: Literal["service_account"] = "service_account"
    name: str
    created_at: int
    role: Literal["admin", "auditor", "owner"]


class AdminKeyObject(KeyObject):
    """A key of an administrator, an auditor or an owner."""

    object: Literal["organization.admin_api_key"] = "organization.admin_api_key"
    owner: AdminKeyOwner


class AdminKeyPage(PageOf[AdminKeyObject]):
    """A part of the list of keys of administrators, auditors and owners."""


class NewAdminKey(AdminKeyObject):
    """Such a key with its value, which is shown here only."""

    value: str


class ServiceAccountDeleted(Deleted):
    """A service account whose key was revoked."""

    object: Literal["organization.project.service_account.deleted"] = "organization.project.service_account.deleted"


class ApiKeyDeleted(Deleted):
    """A project's key that was revoked."""

    object: Literal["organization.project.api_key.deleted"] = "organization.project.api_key.deleted"


class AdminKeyDeleted(Deleted):
    """A key of an administrator, an auditor or an owner that was revoked."""

    object: Literal["organization.admin_api_key.deleted"] = "organization.admin_api_key.deleted"


def account_object(account: ServiceAccount) -> ServiceAccountObject:
    """A service account."""
    return ServiceAccountObject(**_account_fields(account))


def new_account_object(account: ServiceAccount, minted: MintedKey) -> NewServiceAccount:
    """A service account with its key's value."""
    record = minted.record
    key = NewKey(
        id=record.key_id,
        name=record.name,
        value=minted.secret,
        created_at=int(record.created),
        expires_at=_whole(record.expires),
    )
    return NewServiceAccount(**_account_fields(account), api_key=key)


def api_key_object(key: KeyRecord) -> ApiKeyObject:
    """A project's key."""
    account = AccountFields(**_account_fields(ServiceAccount(key)))
    return ApiKeyObject(**_key_fields(key), owner=KeyOwner(service_account=account))


def admin_key_object(key: KeyRecord) -> AdminKeyObject:
    """A key of an administrator, an auditor or an owner."""
    return AdminKeyObject(**_key_fields(key), owner=_admin_key_owner(key))


def new_admin_key_object(minted: MintedKey) -> NewAdminKey:
    """Such a key with its value."""
    key = minted.record
    return NewAdminKey(**_key_fields(key), owner=_admin_key_owner(key), value=minted.secret)


def _account_fields(account: ServiceAccount) -> dict[str, Any]:
    return {"id": account.id, "name": account.name, "created_at": int(account.key.created)}


def _key_fields(key: KeyRecord) -> dict[str, Any]:
    return {
        "id": key.key_id,
        "name": key.name,
        "redacted_value": redacted(key),
        "created_at": int(key.created),
        "expires_at": _whole(key.expires),
    }


def _admin_key_owner(key: KeyRecord) -> AdminKeyOwner:
    return AdminKeyOwner.model_validate(
        {
            "id": key.owner_id or key.key_id,
            "name": key.name,
            "created_at": int(key.created),
            "role": str(key.role),
        }
    )


def redacted(key: KeyRecord) -> str:
    """The part of a key that may be shown."""
    return f"{key.prefix}-..." if len(key.prefix) == 11 else f"{key.prefix[:6]}..."


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
