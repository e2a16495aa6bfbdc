"""Administration of a running server through its HTTP interface."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import quote

from flexgate.policies.audit import LOGS, STARTS, Entry, Head
from flexgate.policies.documents import Quota
from flexgate.server.cli.policy_target import ServerPolicy

Json = dict[str, Any]
_PROJECTS: Final = "/v1/organization/projects"
_ADMIN_KEYS: Final = "/v1/organization/admin_api_keys"
_SETS: Final = "/v1/expert_sets"
_WIRE: Final = dict(
    zip(
        Quota.model_fields,
        (
            "max_requests_per_1_minute",
            "max_tokens_per_1_minute",
            "max_concurrent_requests",
            "max_tokens_per_1_day",
            "max_tokens_per_1_month",
            "max_requests_per_1_day",
            "max_requests_per_1_month",
            "max_cost_per_1_day",
            "max_cost_per_1_month",
            "max_total_tokens",
        ),
        strict=True,
    )
)
_UNLIMITED: Final = 10**15


class ServerTarget(ServerPolicy):
    """A running server, which attributes changes to the key."""

    def projects(self, *, archived: bool) -> list[Json]:
        query = {"include_archived": "true"} if archived else {}
        return [self._permitted(project) for project in self._api.pages(_PROJECTS, **query)]

    def project(self, project_id: str) -> Json:
        path = _one(project_id)
        project = self._permitted(self._api.ask("GET", path))
        keys = [
            {"id": k["id"], "name": k["name"], "prefix": k["redacted_value"], "expires": k["expires_at"]}
            for k in self._api.pages(f"{path}/api_keys")
        ]
        return {**project, "keys": keys}

    def create_project(self, name: str) -> str:
        return str(self._api.ask("POST", _PROJECTS, json={"name": name})["id"])

    def set_experts(self, project_id: str, chosen: Json, before: Json | None = None) -> None:
        body = chosen if before is None else {**chosen, "before": before}
        self._api.ask("POST", f"{_one(project_id)}/expert_permissions", json=body)

    def archive(self, project_id: str) -> None:
        self._api.ask("POST", f"{_one(project_id)}/archive")

    def create_key(self, project_id: str, name: str, seconds: int | None) -> str:
        body = {"name": name, **({} if seconds is None else {"expires_in_seconds": seconds})}
        return str(self._api.ask("POST", f"{_one(project_id)}/service_accounts", json=body)["api_key"]["value"])

    def revoke_key(self, project_id: str, key_id: str) -> None:
        self._api.ask("DELETE", f"{_one(project_id)}/api_keys/{_quoted(key_id)}")

    def admin_keys(self) -> list[Json]:
        return list(self._api.pages(_ADMIN_KEYS))

    def create_admin_key(self, name: str, role: str, owner_id: str | None, seconds: int | None) -> str:
        given = {"name": name, "role": role, "owner_id": owner_id, "expires_in_seconds": seconds}
        body = {field: value for field, value in given.items() if value is not None}
        return str(self._api.ask("POST", _ADMIN_KEYS, json=body)["value"])

    def revoke_admin_key(self, key_id: str) -> None:
        self._api.ask("DELETE", f"{_ADMIN_KEYS}/{_quoted(key_id)}")

    def limits(self, project_id: str) -> dict[str, Json]:
        found = {}
        for limit in self._api.pages(f"{_one(project_id)}/rate_limits"):
            values = {name: limit[wire] for name, wire in _WIRE.items()}
            unlimited = {name: None if value == _UNLIMITED else value for name, value in values.items()}
            found[str(limit["id"]).removeprefix("rl-")] = unlimited
        return found

    def set_limits(self, project_id: str, key_id: str | None, limits: Json) -> None:
        path = f"{_one(project_id)}/rate_limits/rl-{_quoted(key_id or 'project')}"
        self._api.ask("POST", path, json={_WIRE[name]: value for name, value in limits.items()})

    def agreements(self) -> list[Json]:
        return [_without_object(agreement) for agreement in self._api.pages("/v1/agreements")]

    def put_agreement(self, agreement_id: str | None, fields: Json) -> Json:
        path = "/v1/agreements" if agreement_id is None else f"/v1/agreements/{_quoted(agreement_id)}"
        return _without_object(self._api.ask("POST", path, json=fields))

    def terminate_agreement(self, agreement_id: str) -> None:
        self._api.ask("DELETE", f"/v1/agreements/{_quoted(agreement_id)}")

    def sets(self) -> list[Json]:
        return [_without_object(found) for found in self._api.pages(_SETS)]

    def create_set(self, set_id: str, experts: list[str]) -> None:
        self._api.ask("POST", _SETS, json={"id": set_id, "experts": experts})

    def change_set(self, set_id: str, experts: list[str]) -> None:
        self._api.ask("POST", f"{_SETS}/{_quoted(set_id)}", json={"experts": experts})

    def delete_set(self, set_id: str) -> None:
        self._api.ask("DELETE", f"{_SETS}/{_quoted(set_id)}")

    def audit_log(self, after: int) -> Iterator[Entry]:
        path, query = "/v1/organization/audit_logs", {"limit": 100, "before": f"audit_log-{after}"}
        while page := self._api.ask("GET", path, params=query)["data"]:
            yield from map(_entry, reversed(page))
            query["before"] = page[0]["id"]

    def audit_heads(self) -> list[Head]:
        return [self._audit_head(log) for log in LOGS]

    def trim_audit(self, days: int) -> int:
        body = {"older_than_days": days}
        return int(self._api.ask("POST", "/v1/organization/audit_logs/trim", json=body)["trimmed"])

    def _audit_head(self, log: str) -> Head:
        newest = self._api.ask("GET", "/v1/organization/audit_logs", params={"limit": 1, "log": log})["data"]
        own = newest[0]["flexgate"] if newest else None
        return STARTS[log] if own is None else Head(own["sequence"], own["hash"], log)

    def _permitted(self, project: Json) -> Json:
        permissions = self._api.ask("GET", f"{_one(project['id'])}/expert_permissions")
        own = {name: project[name] for name in ("id", "name")}
        chosen = {name: permissions[name] for name in ("mode", "expert_ids")}
        return {**own, **chosen, **project["flexgate"], "archived": project["status"] == "archived"}


def _one(project_id: str) -> str:
    return f"{_PROJECTS}/{_quoted(project_id)}"


def _quoted(id_: str) -> str:
    return quote(id_, safe="")


def _without_object(answer: Json) -> Json:
    return {name: value for name, value in answer.items() if name != "object"}


def _entry(wire: Json) -> Entry:
    own = wire["flexgate"]
    values = {name: own[name] for name in ("sequence", "at", "action", "detail", "previous", "hash", "log")}
    return Entry(actor=wire["actor"]["api_key"]["id"], **values)
