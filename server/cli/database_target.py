"""Administration of the policy database."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Final

from flexgate.policies.audit import Entry, Head
from flexgate.policies.documents import Quota, Role
from flexgate.policies.store import accounts, projects
from flexgate.policies.store import agreements as stored_agreements
from flexgate.policies.store import sets as stored_sets
from flexgate.policies.store.documents import to_json
from flexgate.server.admin.keys.schemas import admin_key_object
from flexgate.server.cli.policy_target import DatabasePolicy
from flexgate.server.cli.store import actor
from flexgate.server.policy.retention import trim_denials

Json = dict[str, Any]
_BATCH: Final = 1000


class DatabaseTarget(DatabasePolicy):
    """The policy database; changes are attributed to the operating system's user."""

    def projects(self, *, archived: bool) -> list[Json]:
        return [to_json(tenant) for tenant in projects.list_projects(self._store, archived=archived)]

    def project(self, project_id: str) -> Json:
        tenant = projects.get_project(self._store, project_id)
        keys = accounts.list_project_keys(self._store, project_id)
        shown = [{"id": k.key_id, "name": k.name, "prefix": k.prefix, "expires": k.expires} for k in keys]
        return {**to_json(tenant), "keys": shown}

    def create_project(self, name: str) -> str:
        return projects.create_project(self._store, name, **_attributed()).id

    def set_experts(self, project_id: str, chosen: Json, before: Json | None = None) -> None:
        projects.update_project(self._store, project_id, chosen, before=before, **_attributed())

    def archive(self, project_id: str) -> None:
        projects.archive_project(self._store, project_id, **_attributed())

    def create_key(self, project_id: str, name: str, seconds: int | None) -> str:
        attributed = _attributed()
        expires = None if seconds is None else attributed["at"] + seconds
        return accounts.create_service_account(self._store, project_id, name, expires=expires, **attributed)[1].secret

    def revoke_key(self, project_id: str, key_id: str) -> None:
        accounts.revoke_project_key(self._store, project_id, key_id, **_attributed())

    def admin_keys(self) -> list[Json]:
        return [admin_key_object(key).model_dump() for key in accounts.list_admin_keys(self._store)]

    def create_admin_key(self, name: str, role: str, owner_id: str | None, seconds: int | None) -> str:
        attributed = _attributed()
        expires = None if seconds is None else attributed["at"] + seconds
        return accounts.create_admin_key(
            self._store, name, role=Role(role), owner_id=owner_id, expires=expires, **attributed
        ).secret

    def revoke_admin_key(self, key_id: str) -> None:
        accounts.revoke_admin_key(self._store, key_id, **_attributed())

    def limits(self, project_id: str) -> dict[str, Json]:
        tenant = projects.get_project(self._store, project_id)
        keys = accounts.list_project_keys(self._store, project_id)
        quotas = {key.key_id: tenant.key_quotas.get(key.key_id, Quota()) for key in keys}
        return {name: to_json(quota) for name, quota in {"project": tenant.quota, **quotas}.items()}

    def set_limits(self, project_id: str, key_id: str | None, limits: Json) -> None:
        projects.set_quota(self._store, project_id, limits, key_id=key_id, **_attributed())

    def agreements(self) -> list[Json]:
        return [to_json(agreement) for agreement in stored_agreements.list_agreements(self._store)]

    def put_agreement(self, agreement_id: str | None, fields: Json) -> Json:
        if agreement_id is None:
            return to_json(stored_agreements.create_agreement(self._store, fields, **_attributed()))
        return to_json(stored_agreements.revise_agreement(self._store, agreement_id, fields, **_attributed()))

    def terminate_agreement(self, agreement_id: str) -> None:
        stored_agreements.terminate_agreement(self._store, agreement_id, **_attributed())

    def sets(self) -> list[Json]:
        return [to_json(found) for found in stored_sets.list_sets(self._store)]

    def create_set(self, set_id: str, experts: list[str]) -> None:
        stored_sets.create_set(self._store, set_id, experts, **_attributed())

    def change_set(self, set_id: str, experts: list[str]) -> None:
        stored_sets.change_set(self._store, set_id, experts, **_attributed())

    def delete_set(self, set_id: str) -> None:
        stored_sets.delete_set(self._store, set_id, **_attributed())

    def audit_log(self, after: int) -> Iterator[Entry]:
        while batch := self._store.audit_log(after=after, limit=_BATCH):
            yield from batch
            after = batch[-1].sequence

    def audit_heads(self) -> list[Head]:
        return list(self._store.audit_heads())

    def trim_audit(self, days: int) -> int:
        return trim_denials(self._store, days=days, now=time.time(), actor=actor())


def _attributed() -> dict[str, Any]:
    return {"actor": actor(), "at": time.time()}
