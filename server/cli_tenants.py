"""`flexgate tenants`: create tenants, say which experts each may use, hand out and revoke keys."""

from __future__ import annotations

import enum
import time
from typing import Annotated, Any, Final

import typer

from flexgate.policies.store import accounts, projects
from flexgate.policies.store.documents import to_json
from flexgate.policies.tenants import Tenant
from flexgate.server.cli_store import (
    AsJson,
    DatabaseUrl,
    Demo,
    StateDir,
    actor,
    opened,
    print_json,
    print_rows,
)

_HELP: Final = (
    "Create tenants, say which experts each may use, hand out and revoke keys.\n\n"
    "Exit status: 0 done; 1 refused or failed, with one sentence; 2 wrong usage."
)
app = typer.Typer(no_args_is_help=True, add_completion=False, help=_HELP)


class Mode(enum.StrEnum):
    """How a tenant's list is meant."""

    ALLOW_LIST = "allow_list"
    DENY_LIST = "deny_list"


Project = Annotated[str, typer.Argument(help="The tenant's id, as 'list' shows it.")]


@app.command("list")
def list_(
    archived: Annotated[bool, typer.Option(help="Archived ones, too.")] = False,
    as_json: AsJson = False,
    demo: Demo = None,
    state_dir: StateDir = None,
    database_url: DatabaseUrl = None,
) -> None:
    """List tenants, oldest first."""
    with opened(demo, state_dir, database_url) as store:
        found = projects.list_projects(store, archived=archived)
    if as_json:
        print_json([to_json(tenant) for tenant in found])
    else:
        print_rows(("id", "name", "mode", "experts"), [_row(tenant) for tenant in found])


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="A name for people.")],
    demo: Demo = None,
    state_dir: StateDir = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Create a tenant and print its id. It may use `public` alone until more is permitted."""
    with opened(demo, state_dir, database_url) as store:
        tenant = projects.create_project(store, name, **_attributed())
    typer.echo(tenant.id)


@app.command()
def show(project: Project, demo: Demo = None, state_dir: StateDir = None, database_url: DatabaseUrl = None) -> None:
    """Print a tenant and its keys as JSON."""
    with opened(demo, state_dir, database_url) as store:
        tenant = projects.get_project(store, project)
        keys = [account.key for account in accounts.list_service_accounts(store, project)]
    shown = [{"id": k.key_id, "name": k.name, "prefix": k.prefix, "expires": k.expires} for k in keys]
    print_json({**to_json(tenant), "keys": shown})


@app.command()
def permit(
    project: Project,
    experts: Annotated[
        list[str] | None, typer.Argument(help="Experts, or sets as 'set:…'; none for an empty list.")
    ] = None,
    mode: Annotated[Mode, typer.Option(help="allow_list: only these. deny_list: all but these.")] = Mode.ALLOW_LIST,
    demo: Demo = None,
    state_dir: StateDir = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Replace a tenant's list of experts. Agreements must permit them, too."""
    fields = {"mode": mode.value, "expert_ids": experts or []}
    with opened(demo, state_dir, database_url) as store:
        projects.update_project(store, project, fields, **_attributed())


@app.command("create-key")
def create_key(
    project: Project,
    name: Annotated[str, typer.Argument(help="Who will use the key.")],
    expires_in_days: Annotated[float | None, typer.Option(min=0.001, max=3650, help="Without it, never.")] = None,
    demo: Demo = None,
    state_dir: StateDir = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Create a key and print it, this once. To rotate, create a second one and revoke the first."""
    now = time.time()
    expires = None if expires_in_days is None else now + expires_in_days * 86_400
    with opened(demo, state_dir, database_url) as store:
        _, minted = accounts.create_service_account(store, project, name, actor=actor(), at=now, expires=expires)
    typer.echo(minted.secret)


@app.command("revoke-key")
def revoke_key(
    project: Project,
    key: Annotated[str, typer.Argument(help="The key's id, as 'show' prints it.")],
    demo: Demo = None,
    state_dir: StateDir = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Revoke a key for good."""
    with opened(demo, state_dir, database_url) as store:
        accounts.revoke_project_key(store, project, key, **_attributed())


@app.command()
def archive(project: Project, demo: Demo = None, state_dir: StateDir = None, database_url: DatabaseUrl = None) -> None:
    """Archive a tenant for good, and revoke its keys."""
    with opened(demo, state_dir, database_url) as store:
        projects.archive_project(store, project, **_attributed())


def _attributed() -> dict[str, Any]:
    return {"actor": actor(), "at": time.time()}


def _row(tenant: Tenant) -> tuple[str, str, str, str]:
    name = f"{tenant.name} (archived)" if tenant.archived else tenant.name
    return tenant.id, name, tenant.mode, ", ".join(sorted(tenant.expert_ids)) or "none"
