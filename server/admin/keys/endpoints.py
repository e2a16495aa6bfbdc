"""Keys: projects get theirs through service accounts, everybody else through `admin_api_keys`."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from flexgate.policies.documents import KeyRecord, Role
from flexgate.policies.store import accounts
from flexgate.policies.store.accounts import ServiceAccount
from flexgate.policies.withhold import Withholding, without_key
from flexgate.server.admin.keys.schemas import (
    AdminKeyDeleted,
    AdminKeyObject,
    AdminKeyPage,
    ApiKeyDeleted,
    ApiKeyObject,
    ApiKeyPage,
    CreateAdminKey,
    CreateServiceAccount,
    ListAdminKeys,
    ListApiKeys,
    NewAdminKey,
    NewServiceAccount,
    ServiceAccountDeleted,
    ServiceAccountObject,
    ServiceAccountPage,
    account_object,
    admin_key_object,
    api_key_object,
    expiry,
    new_account_object,
    new_admin_key_object,
)
from flexgate.server.admin.operation import Call, Nothing, Page, Written
from flexgate.server.admin.pages import page_of
from flexgate.server.admin.router import OperationRouter
from flexgate.server.http.refusals import not_found

_PROJECT: Final = "/v1/organization/projects/{project_id}"
_ACCOUNTS: Final = f"{_PROJECT}/service_accounts"
_ACCOUNT: Final = f"{_ACCOUNTS}/{{service_account_id}}"
_KEYS: Final = f"{_PROJECT}/api_keys"
_KEY: Final = f"{_KEYS}/{{key_id}}"
_ADMIN_KEYS: Final = "/v1/organization/admin_api_keys"
_ADMIN_KEY: Final = f"{_ADMIN_KEYS}/{{key_id}}"
_READ: Final = (Role.ADMIN, Role.AUDITOR)
_WRITE: Final = (Role.ADMIN,)
router: Final = OperationRouter()


def _revoked(call: Call[Any, Any]) -> Withholding:
    return _without(call, call.path["key_id"])


def _revoked_account(call: Call[Any, Any]) -> Withholding:
    return _without(call, call.path["service_account_id"].replace("svc_acct_", "key_", 1))


@router.operation("POST", _ACCOUNTS, roles=_WRITE)
def create_account(call: Call[CreateServiceAccount, Written]) -> NewServiceAccount:
    """Create a service account with its key. Only this response has the key's value."""
    account, minted = accounts.create_service_account(
        call.store,
        call.path["project_id"],
        call.body.name,
        expires=expiry(call.body.expires_in_seconds, call.now),
        **call.attributed,
    )
    return new_account_object(account, minted)


@router.operation("GET", _ACCOUNTS, roles=_READ)
def list_accounts(call: Call[Nothing, Page]) -> ServiceAccountPage:
    """List a project's service accounts, oldest first."""
    found = accounts.list_service_accounts(call.store, call.path["project_id"])
    chosen, more = page_of(found, call.query, lambda account: account.id)
    return ServiceAccountPage.of([account_object(account) for account in chosen], more=more)


@router.operation("GET", _ACCOUNT, roles=_READ)
def retrieve_account(call: Call[Nothing, Nothing]) -> ServiceAccountObject:
    """Show one service account."""
    return account_object(_account(call))


@router.operation("DELETE", _ACCOUNT, roles=_WRITE, withholds=_revoked_account)
def delete_account(call: Call[Nothing, Written]) -> ServiceAccountDeleted:
    """Delete a service account and revoke its key."""
    project_id, account_id = call.path["project_id"], call.path["service_account_id"]
    accounts.delete_service_account(call.store, project_id, account_id, **call.attributed)
    return ServiceAccountDeleted(id=account_id)


@router.operation("GET", _KEYS, roles=_READ)
def list_keys(call: Call[Nothing, ListApiKeys]) -> ApiKeyPage:
    """List a project's keys that are not revoked, oldest first."""
    found = accounts.list_project_keys(call.store, call.path["project_id"])
    chosen, more = page_of(found, call.query, lambda key: key.key_id)
    return ApiKeyPage.of([api_key_object(key) for key in chosen], more=more)


@router.operation("GET", _KEY, roles=_READ)
def retrieve_key(call: Call[Nothing, Nothing]) -> ApiKeyObject:
    """Show one key, without its value."""
    return api_key_object(_one(accounts.list_project_keys(call.store, call.path["project_id"]), call))


@router.operation("DELETE", _KEY, roles=_WRITE, withholds=_revoked)
def delete_key(call: Call[Nothing, Written]) -> ApiKeyDeleted:
    """Revoke a key for good."""
    project_id = call.path["project_id"]
    key = _one(accounts.list_project_keys(call.store, project_id), call)
    accounts.revoke_project_key(call.store, project_id, key.key_id, **call.attributed)
    return ApiKeyDeleted(id=key.key_id)


@router.operation("POST", _ADMIN_KEYS, roles=_WRITE)
def create_admin_key(call: Call[CreateAdminKey, Written]) -> NewAdminKey:
    """Create a key of an administrator, auditor or owner. Only this response has its value."""
    minted = accounts.create_admin_key(
        call.store,
        call.body.name,
        role=Role(call.body.role),
        owner_id=call.body.owner_id,
        expires=expiry(call.body.expires_in_seconds, call.now),
        **call.attributed,
    )
    return new_admin_key_object(minted)


@router.operation("GET", _ADMIN_KEYS, roles=_READ)
def list_admin_keys(call: Call[Nothing, ListAdminKeys]) -> AdminKeyPage:
    """List the keys of administrators, auditors and owners."""
    found = accounts.list_admin_keys(call.store)
    if call.query.order == "desc":
        found.reverse()
    chosen, more = page_of(found, call.query, lambda key: key.key_id)
    return AdminKeyPage.of([admin_key_object(key) for key in chosen], more=more)


@router.operation("GET", _ADMIN_KEY, roles=_READ)
def retrieve_admin_key(call: Call[Nothing, Nothing]) -> AdminKeyObject:
    """Show one of these keys, without its value."""
    return admin_key_object(_one(accounts.list_admin_keys(call.store), call))


@router.operation("DELETE", _ADMIN_KEY, roles=_WRITE, withholds=_revoked)
def delete_admin_key(call: Call[Nothing, Written]) -> AdminKeyDeleted:
    """Revoke one of these keys. The only admin key without an expiry date cannot be revoked."""
    key = _one(accounts.list_admin_keys(call.store), call)
    accounts.revoke_admin_key(call.store, key.key_id, **call.attributed)
    return AdminKeyDeleted(id=key.key_id)


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
