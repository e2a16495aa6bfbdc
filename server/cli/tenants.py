"""`flexgate tenants`: create tenants, set which experts each may use and its limits, create and revoke keys."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Annotated, Final

import typer

from flexgate.experts.cli.support import print_table
from flexgate.policies.errors import ChangeRefused
from flexgate.server.cli.money import cost_of
from flexgate.server.cli.store import AsJson, print_json
from flexgate.server.cli.target import READER, Json, Target, administers

_HELP: Final = (
    "Create tenants, set which experts each may use and its limits, create and revoke keys.\n\n"
    "Acts on the policy database, or with --url and --key on a running server.\n\n"
    "Exit status: 0 done; 1 refused or failed, the reason is printed; 2 invalid usage."
)
app = typer.Typer(no_args_is_help=True, add_completion=False, help=_HELP)


class Mode(enum.StrEnum):
    """Mode of a tenant's list."""

    ALLOW_LIST = "allow_list"
    DENY_LIST = "deny_list"


Project = Annotated[str, typer.Argument(help="The tenant's id, as 'list' shows it.")]
KeyId = Annotated[str, typer.Argument(help="The key's id, as 'show' prints it.")]
REMOVED: Final = "-1"
Limit = Annotated[int | None, typer.Option(min=-1, help="Limit; -1 removes it.", show_default=False)]
CostLimit = Annotated[
    str | None,
    typer.Option(metavar="COST", help="Budget of money, such as '100 EUR'; -1 removes it.", show_default=False),
]


@administers(app, "list", roles=READER)
def list_(
    target: Target,
    archived: Annotated[bool, typer.Option(help="Also list archived tenants.")] = False,
    as_json: AsJson = False,
) -> None:
    """List tenants, oldest first."""
    found = target.projects(archived=archived)
    if as_json:
        print_json(found)
    else:
        print_table(("id", "name", "mode", "experts"), [_row(tenant) for tenant in found], empty="no tenants")


@administers(app)
def create(target: Target, name: Annotated[str, typer.Argument(help="Name of the tenant, for people.")]) -> None:
    """Create a tenant and print its id. At first it may use `public` only."""
    typer.echo(target.create_project(name))


@administers(app, roles=READER)
def show(target: Target, project: Project) -> None:
    """Print a tenant and its keys as JSON."""
    print_json(target.project(project))


@administers(app)
def set_experts(
    target: Target,
    project: Project,
    experts: Annotated[list[str] | None, typer.Argument(help="The whole list: expert ids, or sets ('set:…').")] = None,
    none: Annotated[bool, typer.Option("--none", help="Empty the list.")] = False,
    add: Annotated[list[str] | None, typer.Option(help="Expert or set to add; may be repeated.")] = None,
    remove: Annotated[list[str] | None, typer.Option(help="Expert or set to remove; may be repeated.")] = None,
    mode: Annotated[
        Mode | None,
        typer.Option(help="allow_list: only these may be used. deny_list: all but these. Default: the mode stays."),
    ] = None,
) -> None:
    """Set a tenant's list of experts, or change it, and print it.

    To be used, an expert also needs an agreement that permits it.
    """
    if sum(map(bool, (experts, none, add or remove))) != 1:
        raise typer.BadParameter("give the whole list of experts, or --none, or what to --add and --remove")
    if mode is not None and (add or remove):
        raise typer.BadParameter("--mode gives the list another meaning: give the whole list with it, or --none")
    chosen: Json
    if mode is not None:
        before, chosen = None, {"mode": mode.value, "expert_ids": experts or []}
    else:
        found = target.project(project)
        before = {"mode": found["mode"], "expert_ids": found["expert_ids"]}
        listed = _changed(found["expert_ids"], add or [], remove or []) if add or remove else experts or []
        chosen = {"mode": found["mode"], "expert_ids": listed}
    target.set_experts(project, chosen, before)
    typer.echo(f"{chosen['mode']}: {_shown(chosen['expert_ids'])}")


def _changed(listed: list[str], add: list[str], remove: list[str]) -> list[str]:
    """The list without what is removed, which has to be on it, and with what is added."""
    if missing := set(remove) - set(listed):
        raise ChangeRefused(f"{min(missing)!r} is not on the list, which has: {_shown(listed)}")
    return sorted((set(listed) | set(add)) - set(remove))


@administers(app)
def create_key(
    target: Target,
    project: Project,
    name: Annotated[str, typer.Argument(help="Name of the key, for people.")],
    expires_in_days: Annotated[
        float | None, typer.Option(min=0.001, max=3650, help="Days until the key expires; default: never.")
    ] = None,
) -> None:
    """Create a key and print it; it is shown only once. To rotate, create a second key and revoke the first."""
    typer.echo(target.create_key(project, name, None if expires_in_days is None else round(expires_in_days * 86_400)))


@administers(app)
def revoke_key(target: Target, project: Project, key_id: KeyId) -> None:
    """Revoke a key permanently."""
    target.revoke_key(project, key_id)


@administers(app, roles=READER)
def limits(target: Target, project: Project, as_json: AsJson = False) -> None:
    """Show the limits of a tenant and of each of its keys."""
    found = target.limits(project)
    if as_json:
        print_json(found)
        return
    names = list(found["project"])
    rows = [[scope, *map(_written, of.values())] for scope, of in found.items()]
    print_table(["scope", *(name.replace("_", " ") for name in names)], rows, empty="no limits")


@administers(app)
def set_limits(
    target: Target,
    project: Project,
    of_key: Annotated[
        str | None, typer.Option(help="Id of a key of the tenant: limit this key instead of the tenant.")
    ] = None,
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    concurrent_requests: Limit = None,
    tokens_per_day: Limit = None,
    tokens_per_month: Limit = None,
    requests_per_day: Limit = None,
    requests_per_month: Limit = None,
    cost_per_day: CostLimit = None,
    cost_per_month: CostLimit = None,
    total_tokens: Limit = None,
) -> None:
    """Set the given limits of a tenant or of one of its keys; others keep their values."""
    given = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrent_requests": concurrent_requests,
        "tokens_per_day": tokens_per_day,
        "tokens_per_month": tokens_per_month,
        "requests_per_day": requests_per_day,
        "requests_per_month": requests_per_month,
        "cost_per_day": cost_per_day,
        "cost_per_month": cost_per_month,
        "total_tokens": total_tokens,
    }
    chosen = {
        name: None if value in (-1, REMOVED) else cost_of(value) if isinstance(value, str) else value
        for name, value in given.items()
        if value is not None
    }
    if not chosen:
        raise typer.BadParameter("give at least one limit, such as --requests-per-minute 60")
    target.set_limits(project, of_key, chosen)


@administers(app)
def archive(target: Target, project: Project) -> None:
    """Archive a tenant permanently and revoke its keys."""
    target.archive(project)


def _written(limit: Json | int | None) -> str:
    if isinstance(limit, dict):
        return f"{limit['amount']} {limit['currency']}"
    return "none" if limit is None else str(limit)


def _row(tenant: Json) -> tuple[str, str, str, str]:
    name = f"{tenant['name']} (archived)" if tenant["archived"] else tenant["name"]
    return tenant["id"], name, tenant["mode"], _shown(tenant["expert_ids"])


def _shown(experts: Iterable[str]) -> str:
    return ", ".join(sorted({*experts})) or "none"
