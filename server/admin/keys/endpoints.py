"""Keys: projects get theirs through service accounts, everybody else through `admin_api_keys`."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from flexgate.policies.documents import KeyRecord, Role
from flexgate.policies.store import accounts
from flexgate.policies.store.accounts import ServiceAccount
from flexgate.policies.withhold import Withholding, without_key
from flexgate.server.admin.keys.schemas import (
    CreateAdminKey,
    CreateServiceAccount,
    ListAdminKeys,
    ListApiKeys,
    account_object,
    admin_key_object,
    api_key_object,
    expiry,
    new_account_object,
)
from flexgate.server.admin.operation import Call, Json, Nothing, Operation, Page, Written
from flexgate.server.admin.pages import list_object, page_of
from flexgate.server.http.refusals import not_found


def create_account(call: Call[CreateServiceAccount, Written]) -> Json:
    """Create a service account with its key; the answer alone shows the key's value."""
    account, minted = accounts.create_service_account(
        call.store,
        call.path["project_id"],
        call.body.name,
        expires=expiry(call.body.expires_in_seconds, call.now),
        **call.attributed,
    )
    return new_account_object(account, minted)


def list_accounts(call: Call[Nothing, Page]) -> Json:
    """List a project's service accounts, oldest first."""
    found = accounts.list_service_accounts(call.store, call.path["project_id"])
    chosen, more = page_of(found, call.query, lambda account: account.id)
    return list_object([account_object(account) for account in chosen], more)


def retrieve_account(call: Call[Nothing, Nothing]) -> Json:
    """Show one service account."""
    return account_object(_account(call))


def delete_account(call: Call[Nothing, Written]) -> Json:
    """Delete a service account: its key is revoked."""
    project_id, account_id = call.path["project_id"], call.path["service_account_id"]
    accounts.delete_service_account(call.store, project_id, account_id, **call.attributed)
    return {"id": account_id, "object": "organization.project.service_account.deleted", "deleted": True}


def list_keys(call: Call[Nothing, ListApiKeys]) -> Json:
    """List a project's keys that are not revoked, oldest first."""
    found = accounts.list_project_keys(call.store, call.path["project_id"])
    chosen, more = page_of(found, call.query, lambda key: key.key_id)
    return list_object([api_key_object(key) for key in chosen], more)


def retrieve_key(call: Call[Nothing, Nothing]) -> Json:
    """Show one key, without its value."""
    return api_key_object(_one(accounts.list_project_keys(call.store, call.path["project_id"]), call))


def delete_key(call: Call[Nothing, Written]) -> Json:
    """Revoke a key for good."""
    project_id = call.path["project_id"]
    key = _one(accounts.list_project_keys(call.store, project_id), call)
    accounts.revoke_project_key(call.store, project_id, key.key_id, **call.attributed)
    return {"id": key.key_id, "object": "organization.project.api_key.deleted", "deleted": True}


def create_admin_key(call: Call[CreateAdminKey, Written]) -> Json:
    """Create a key that administers, audits or speaks for an owner; its value is shown here only."""
    minted = accounts.create_admin_key(
        call.store,
        call.body.name,
        role=Role(call.body.role),
        owner_id=call.body.owner_id,
        expires=expiry(call.body.expires_in_seconds, call.now),
        **call.attributed,
    )
    return {**admin_key_object(minted.record), "value": minted.secret}


def list_admin_keys(call: Call[Nothing, ListAdminKeys]) -> Json:
    """List these keys."""
    found = accounts.list_admin_keys(call.store)
    if call.query.order == "desc":
        found.reverse()
    chosen, more = page_of(found, call.query, lambda key: key.key_id)
    return list_object([admin_key_object(key) for key in chosen], more)


def retrieve_admin_key(call: Call[Nothing, Nothing]) -> Json:
    """Show one of them, without its value."""
    return admin_key_object(_one(accounts.list_admin_keys(call.store), call))


def delete_admin_key(call: Call[Nothing, Written]) -> Json:
    """Revoke one of them. The last admin key that does not expire is kept."""
    key = _one(accounts.list_admin_keys(call.store), call)
    accounts.revoke_admin_key(call.store, key.key_id, **call.attributed)
    return {"id": key.key_id, "object": "organization.admin_api_key.deleted", "deleted": True}


def _revoked(call: Call[Any, Any]) -> Withholding:
    return _without(call, call.path["key_id"])


def _revoked_account(call: Call[Any, Any]) -> Withholding:
    return _without(call, call.path["service_account_id"].replace("svc_acct_", "key_", 1))


def _without(call: Call[Any, Any], key_id: str) -> Withholding:
    return partial(without_key, key_id=key_id, tenant_id=call.path.get("project_id"), now=call.now)


def _account(call: Call[Any, Any]) -> ServiceAccount:
    for account in accounts.list_service_accounts(call.store, call.path["project_id"]):
        if account.id == call.path["service_account_id"]:
            return account
    raise not_found()


def _one(keys: list[KeyRecord], call: Call[Any, Any]) -> KeyRecord:
    for key in keys:
        if key.key_id == call.path["key_id"]:
            return key
    raise not_found()


_PROJECT: Final = "/v1/organization/projects/{project_id}"
_ACCOUNTS: Final = f"{_PROJECT}/service_accounts"
_ACCOUNT: Final = f"{_ACCOUNTS}/{{service_account_id}}"
_KEYS: Final = f"{_PROJECT}/api_keys"
_KEY: Final = f"{_KEYS}/{{key_id}}"
_ADMIN_KEYS: Final = "/v1/organization/admin_api_keys"
_ADMIN_KEY: Final = f"{_ADMIN_KEYS}/{{key_id}}"
_READ: Final = (Role.ADMIN, Role.AUDITOR)
_WRITE: Final = (Role.ADMIN,)

OPERATIONS: Final[tuple[Operation[Any, Any], ...]] = (
    Operation(method="GET", path=_ACCOUNTS, roles=_READ, work=list_accounts, query=Page),
    Operation(
        method="POST", path=_ACCOUNTS, roles=_WRITE, work=create_account, body=CreateServiceAccount, query=Written
    ),
    Operation(method="GET", path=_ACCOUNT, roles=_READ, work=retrieve_account),
    Operation(
        method="DELETE", path=_ACCOUNT, roles=_WRITE, work=delete_account, query=Written, withholds=_revoked_account
    ),
    Operation(method="GET", path=_KEYS, roles=_READ, work=list_keys, query=ListApiKeys),
    Operation(method="GET", path=_KEY, roles=_READ, work=retrieve_key),
    Operation(method="DELETE", path=_KEY, roles=_WRITE, work=delete_key, query=Written, withholds=_revoked),
    Operation(method="GET", path=_ADMIN_KEYS, roles=_READ, work=list_admin_keys, query=ListAdminKeys),
    Operation(method="POST", path=_ADMIN_KEYS, roles=_WRITE, work=create_admin_key, body=CreateAdminKey, query=Written),
    Operation(method="GET", path=_ADMIN_KEY, roles=_READ, work=retrieve_admin_key),
    Operation(method="DELETE", path=_ADMIN_KEY, roles=_WRITE, work=delete_admin_key, query=Written, withholds=_revoked),
)
