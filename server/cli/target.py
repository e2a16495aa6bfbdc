"""What an administrative command acts on: the policy database, or a running server by URL and key.

Both give the same output. A server responds once its own process enforces a change. A change made in the database
reaches every server on it with the next poll.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final, Protocol

import typer

from flexgate.experts.cli.api import Api
from flexgate.policies.audit import LOGS, STARTS, Entry, Head
from flexgate.policies.documents import Quota, Role
from flexgate.policies.store import accounts, projects
from flexgate.policies.store import agreements as stored_agreements
from flexgate.policies.store import sets as stored_sets
from flexgate.policies.store.documents import to_json
from flexgate.server.admin.keys.schemas import admin_key_object
from flexgate.server.cli.options import place_option
from flexgate.server.cli.place import chosen_place
from flexgate.server.cli.policy_target import DatabasePolicy, PolicyTarget, ServerPolicy
from flexgate.server.cli.store import actor, failing, opened
from flexgate.server.policy.retention import trim_denials

Json = dict[str, Any]
Url = Annotated[str | None, typer.Option(help="Act on this running server, not on a database.", envvar="FLEXGATE_URL")]
ADMIN: Final = "admin"
READER: Final = "admin or auditor"


def key_option(roles: str) -> Any:
    """The option --key of a command that keys of these roles may run."""
    return typer.Option(help=f"API key for --url; its role must be {roles}.", envvar="FLEXGATE_KEY")


TARGETS: Final[dict[str, Any]] = {
    "demo": place_option("demo", "Act on the demo's policy database."),
    "state_dir": place_option("state_dir", "Act on the SQLite policy database in this state directory."),
    "database_url": place_option("database_url", "Act on the policy database of this SQLAlchemy URL."),
    "url": Url,
}
_BATCH: Final = 1000
_PROJECTS: Final = "/v1/organization/projects"
_ADMIN_KEYS: Final = "/v1/organization/admin_api_keys"
_SETS: Final = "/v1/expert_sets"
LIMITS: Final = tuple(Quota.model_fields)
"""Names of limits, as :class:`Quota` has them."""
_WIRE: Final = dict(
    zip(
        LIMITS,
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


class Target(PolicyTarget, Protocol):
    """Administration. Objects are JSON; ids, names and modes are those of the HTTP interface."""

    def projects(self, *, archived: bool) -> list[Json]:
        """Tenants with ``id``, ``name``, ``archived``, ``mode`` and ``expert_ids``, oldest first."""

    def project(self, project_id: str) -> Json:
        """One tenant with all fields and its ``keys``."""

    def create_project(self, name: str) -> str:
        """The new tenant's id."""

    def set_experts(self, project_id: str, chosen: Json, before: Json | None = None) -> None:
        """Set a tenant's ``mode`` and ``expert_ids``; refused if they are no longer what they were ``before``."""

    def archive(self, project_id: str) -> None:
        """Archive a tenant permanently."""

    def create_key(self, project_id: str, name: str, seconds: int | None) -> str:
        """The new key's secret."""

    def revoke_key(self, project_id: str, key_id: str) -> None:
        """Revoke a key permanently."""

    def admin_keys(self) -> list[Json]:
        """Keys of admins, auditors and owners that are not revoked, oldest first."""

    def create_admin_key(self, name: str, role: str, owner_id: str | None, seconds: int | None) -> str:
        """The new key's secret."""

    def revoke_admin_key(self, key_id: str) -> None:
        """Revoke a key of an admin, auditor or owner permanently."""

    def limits(self, project_id: str) -> dict[str, Json]:
        """Limits of a tenant (under ``project``) and of each of its keys; None means unlimited."""

    def set_limits(self, project_id: str, key_id: str | None, limits: Json) -> None:
        """Change the given limits; None removes one."""

    def agreements(self) -> list[Json]:
        """Agreements that were not terminated, oldest first."""

    def put_agreement(self, agreement_id: str | None, fields: Json) -> Json:
        """Make an agreement, or replace one."""

    def terminate_agreement(self, agreement_id: str) -> None:
        """Terminate an agreement now."""

    def sets(self) -> list[Json]:
        """Sets of experts with ``id`` and ``experts``, oldest first."""

    def create_set(self, set_id: str, experts: list[str]) -> None:
        """Create a set."""

    def change_set(self, set_id: str, experts: list[str]) -> None:
        """Replace the experts of a set."""

    def delete_set(self, set_id: str) -> None:
        """Delete a set that nothing names."""

    def audit_log(self, after: int) -> Iterator[Entry]:
        """Entries after a number, oldest first."""

    def audit_heads(self) -> list[Head]:
        """The newest entry of each log."""

    def trim_audit(self, days: int) -> int:
        """Delete entries of denied requests older than ``days``; returns their number."""


@contextmanager
def target(context: typer.Context, options: dict[str, Any]) -> Iterator[Target]:
    """Open the database, or with ``url`` the server; an error becomes one sentence and an exit status."""
    with failing():
        place = chosen_place(options, typed_options(context))
    if place["url"] is None:
        with opened(place["demo"], place["state_dir"], place["database_url"]) as store:
            yield DatabaseTarget(store)
        return
    with failing(), Api(place["url"], place["key"] or "") as api:
        yield ServerTarget(api)


def administers(
    app: typer.Typer, name: str | None = None, *, roles: str = ADMIN
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose first argument is the target that further options name; `roles` of keys may run it."""

    def register(work: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(work, eval_str=True).parameters.values())[1:]

        def run(context: typer.Context, options: dict[str, Any], **given: Any) -> None:
            with target(context, options) as chosen:
                work(chosen, **given)

        run.__doc__ = work.__doc__
        with_target_options(app, run, own, name or work.__name__.replace("_", "-"), roles)
        return work

    return register


def with_target_options(
    app: typer.Typer, work: Callable[..., None], own: list[inspect.Parameter], name: str, roles: str
) -> None:
    """Register a command that takes its context, the options that name a target, and parameters of its `own`."""
    options = {**TARGETS, "key": Annotated[str | None, key_option(roles)]}

    def run(context: typer.Context, **given: Any) -> None:
        work(context, {option: given.pop(option) for option in options}, **given)

    keyword = inspect.Parameter.KEYWORD_ONLY
    shared = [inspect.Parameter(o, keyword, default=None, annotation=options[o]) for o in options]
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    parameters = [context, *(parameter.replace(kind=keyword) for parameter in own), *shared]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__doc__ = work.__doc__
    app.command(name)(run)


def typed_options(context: typer.Context) -> set[str]:
    """Which of the target's options were typed, and not taken from the environment."""
    sources = {option: context.get_parameter_source(option) for option in (*TARGETS, "key")}
    return {option for option, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


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


def _attributed() -> dict[str, Any]:
    return {"actor": actor(), "at": time.time()}


def _one(project_id: str) -> str:
    return f"{_PROJECTS}/{_quoted(project_id)}"


def _quoted(id_: str) -> str:
    from urllib.parse import quote

    return quote(id_, safe="")


def _without_object(answer: Json) -> Json:
    return {name: value for name, value in answer.items() if name != "object"}


def _entry(wire: Json) -> Entry:
    own = wire["flexgate"]
    values = {name: own[name] for name in ("sequence", "at", "action", "detail", "previous", "hash", "log")}
    return Entry(actor=wire["actor"]["api_key"]["id"], **values)
