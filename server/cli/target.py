"""What an administrative command acts on: the policy database, or a running server by URL and key.

Both give the same output. A server responds once its own process enforces a change. A change made in the database
reaches every server on it with the next poll.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final, Protocol

import typer

from flexgate.experts.cli.api import Api
from flexgate.policies.audit import Entry, Head
from flexgate.policies.documents import Quota
from flexgate.server.cli.database_target import DatabaseTarget
from flexgate.server.cli.options import place_option
from flexgate.server.cli.place import chosen_place
from flexgate.server.cli.policy_target import PolicyTarget
from flexgate.server.cli.server_target import ServerTarget
from flexgate.server.cli.store import failing, opened

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
LIMITS: Final = tuple(Quota.model_fields)
"""Names of limits, as :class:`Quota` has them."""


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
