"""Keys: through service accounts, or as admin keys.

A service account stands for exactly one key of a project; to rotate, create a second account, move
over, and delete the first. A deleted account's key is revoked and stays on record.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexgate.policies.documents import KeyRecord, Role
from flexgate.policies.errors import ChangeRefused, ObjectUnknown
from flexgate.policies.store.change import Change
from flexgate.policies.store.database import reading
from flexgate.policies.store.keys import MintedKey, read_keys
from flexgate.policies.store.projects import active_project, get_project
from flexgate.policies.store.schema import api_keys
from flexgate.policies.store.store import Store


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    """A project's robot user, with the record of its key."""

    key: KeyRecord

    @property
    def id(self) -> str:
        return self.key.key_id.replace("key_", "svc_acct_", 1)

    @property
    def name(self) -> str:
        return self.key.name


def create_service_account(
    store: Store,
    project_id: str,
    name: str,
    *,
    actor: str,
    at: float,
    expires: float | None = None,
) -> tuple[ServiceAccount, MintedKey]:
    """A new account with its key, whose secret is shown here only; raises `ObjectUnknown`."""
    with store.change(actor=actor, note="create service account", at=at) as change:
        tenant = active_project(change, project_id)
        minted = change.mint_key(Role.TENANT, tenant_id=tenant.id, name=name, expires=expires)
    return ServiceAccount(minted.record), minted


def list_service_accounts(store: Store, project_id: str) -> list[ServiceAccount]:
    """The accounts of a project that are not deleted, oldest first; raises `ObjectUnknown`."""
    return [ServiceAccount(key) for key in list_project_keys(store, project_id)]


def list_project_keys(store: Store, project_id: str) -> list[KeyRecord]:
    """The keys of a project that are not revoked, oldest first; raises `ObjectUnknown`."""
    get_project(store, project_id)
    with reading(store.engine) as connection:
        return read_keys(connection, api_keys.c.tenant_id == project_id, api_keys.c.revoked.is_(None))


def delete_service_account(store: Store, project_id: str, account_id: str, *, actor: str, at: float) -> ServiceAccount:
    """Revoke the account's key; another project's account counts as unknown."""
    for account in list_service_accounts(store, project_id):
        if account.id == account_id:
            return ServiceAccount(revoke_project_key(store, project_id, account.key.key_id, actor=actor, at=at))
    raise ObjectUnknown(f"there is no service account {account_id!r} in this project")


def revoke_project_key(store: Store, project_id: str, key_id: str, *, actor: str, at: float) -> KeyRecord:
    """Revoke a key of a project; another project's key counts as unknown."""
    with store.change(actor=actor, note="revoke key", at=at, urgent=True) as change:
        key = _find(change, key_id)
        if key is None or key.tenant_id != project_id:
            raise ObjectUnknown(f"there is no key {key_id!r} in this project")
        return change.revoke_key(key_id)


def create_admin_key(
    store: Store,
    name: str,
    *,
    actor: str,
    at: float,
    role: Role = Role.ADMIN,
    owner_id: str | None = None,
    expires: float | None = None,
) -> MintedKey:
    """A key for an administrator, an auditor or an owner; none of them can infer."""
    if role is Role.TENANT:
        raise ChangeRefused("a project's keys are made through its service accounts")
    with store.change(actor=actor, note="create admin key", at=at) as change:
        return change.mint_key(role, owner_id=owner_id, name=name, expires=expires)


def list_admin_keys(store: Store) -> list[KeyRecord]:
    """The keys of administrators, auditors and owners that are not revoked, oldest first."""
    with reading(store.engine) as connection:
        return read_keys(connection, api_keys.c.role != Role.TENANT.value, api_keys.c.revoked.is_(None))


def revoke_admin_key(store: Store, key_id: str, *, actor: str, at: float) -> KeyRecord:
    """Revoke a key. The only admin key without an expiry date is refused: without it none could be created."""
    with store.change(actor=actor, note="revoke admin key", at=at, urgent=True) as change:
        key = _find(change, key_id)
        if key is None or key.role is Role.TENANT:
            raise ObjectUnknown(f"there is no admin key {key_id!r}")
        others = change.keys(api_keys.c.role == Role.ADMIN.value, api_keys.c.id != key_id)
        if key.role is Role.ADMIN and not any(_lasting_admin(other) for other in others):
            raise ChangeRefused("this is the only admin key without an expiry date: create another one first")
        return change.revoke_key(key_id)


def _lasting_admin(key: KeyRecord) -> bool:
    return key.role is Role.ADMIN and key.revoked is None and key.expires is None


def _find(change: Change, key_id: str) -> KeyRecord | None:
    return next(iter(change.keys(api_keys.c.id == key_id)), None)
