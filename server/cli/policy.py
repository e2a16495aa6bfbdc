"""`flexgate policy`: the policy as a file, why it gives what it gives, and what a file would change."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer

from flexgate.experts.cli.support import print_table
from flexgate.policies.store.gitops import PolicyFile
from flexgate.server.cli import policy_yaml
from flexgate.server.cli.store import DIFFERENT, AsJson, failing, print_json
from flexgate.server.cli.target import Json, Target, administers

_HELP: Final = (
    "The policy as a file, why it gives what it gives, and what a file would change.\n\n"
    "Acts on the policy database, or with --url and --key on a running server.\n\n"
    "Exit status: 0 done, or no difference; 1 refused or failed, with one sentence; 2 wrong usage; 3 "
    "`diff` and `simulate` found differences."
)
app = typer.Typer(no_args_is_help=True, add_completion=False, help=_HELP)

_REFUSED: Final = "everything: refused from then on"
File = Annotated[Path, typer.Argument(help="A policy file, YAML or JSON; '-' reads standard input.")]
Prune = Annotated[
    bool, typer.Option(help="Also terminate agreements, remove sets and archive tenants that the file does not name.")
]


@app.command()
def schema() -> None:
    """Print the JSON schema of policy files, for editors and CI."""
    print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **PolicyFile.model_json_schema()})


@administers(app)
def export(
    target: Target,
    version: Annotated[int | None, typer.Option(help="As it was at this policy version.", show_default="now")] = None,
) -> None:
    """Print the policy as a file. Applied again, it changes nothing."""
    sys.stdout.write(policy_yaml.dump(target.export_policy(version)))


@administers(app)
def diff(target: Target, file: File, prune: Prune = False, as_json: AsJson = False) -> None:
    """Say what applying a file would change. Exit status 3 if anything."""
    changes = target.plan_policy(policy_yaml.load(file), prune=prune)
    _print_changes(changes, as_json, none="nothing would change")
    raise typer.Exit(DIFFERENT if changes else 0)


@administers(app)
def apply(
    target: Target,
    file: File,
    prune: Prune = False,
    dry_run: Annotated[bool, typer.Option(help="Check everything and change nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make the policy say what a file says, in one revision, or not at all."""
    content = policy_yaml.load(file)
    changes = target.plan_policy(content, prune=prune) if dry_run else target.apply_policy(content, prune=prune)
    _print_changes(changes, as_json, none="nothing would change" if dry_run else "nothing to change")


@administers(app)
def rollback(
    target: Target,
    version: Annotated[int, typer.Argument(min=0, help="The policy version that comes back.")],
    confirm: Annotated[int | None, typer.Option(help="The present version: says that it is meant.")] = None,
) -> None:
    """Make the policy say what it text at a version. Without --confirm, only say what would change, and fail."""
    typer.echo(target.roll_back(version, confirm))


@administers(app)
def explain(
    target: Target,
    project: Annotated[str, typer.Argument(help="The tenant's id, as 'flexgate tenants list' shows it.")],
    purpose: Annotated[str | None, typer.Option(help="What requests would declare.")] = None,
    region: Annotated[str | None, typer.Option(help="Where requests would say they are.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say which experts a tenant may use, and why, or why not and what would change it."""
    found = target.explain(project, purpose, region)
    if as_json:
        print_json(found)
    else:
        print_table(("expert", "", "why"), [_row(explanation) for explanation in found], empty="no experts")


@administers(app)
def simulate(target: Target, file: File, prune: Prune = False, as_json: AsJson = False) -> None:
    """Say which tenants would gain or lose what, if a file were applied. Exit status 3 if any.

    Asked again are requests of late, and what a request would get that asks for nothing special.
    """
    found = target.simulate(policy_yaml.load(file), prune=prune)
    differences = found["differences"]
    if as_json:
        print_json(differences)
    else:
        rows = _difference_rows(differences, found["unfiltered_samples"])
        print_table(("tenant", "when declaring", "gains", "loses"), rows, empty="nothing would change for any tenant")
    raise typer.Exit(DIFFERENT if differences else 0)


@app.command()
def check(file: File) -> None:
    """Check a file's form without any database."""
    with failing():
        policy_yaml.load(file, stored=False)


def _print_changes(changes: list[Json], as_json: bool, *, none: str) -> None:
    if as_json:
        print_json(changes)
    else:
        print_table(("change", "kind", "id", "fields"), [_change_row(change) for change in changes], empty=none)


def _change_row(change: Json) -> tuple[str, str, str, str]:
    before, after = change["before"] or {}, change["after"] or {}
    if not before or not after:
        return "remove" if before else "add", change["kind"], change["id"], ""
    fields = ", ".join(name for name in {**before, **after} if before.get(name) != after.get(name))
    return "change", change["kind"], change["id"], fields


def _row(explanation: Json) -> tuple[str, str, str]:
    if not explanation["allowed"]:
        return explanation["expert"], "excluded", explanation["reason"]["message"]
    until = explanation["until"]
    ends = "" if until is None else f" until {datetime.fromtimestamp(until, UTC):%Y-%m-%dT%H:%M:%SZ}"
    return explanation["expert"], "allowed", "by " + ", ".join(explanation["permitted_by"]) + ends


def _difference_rows(differences: list[Json], unfiltered: dict[str, int]) -> list[tuple[str, str, str, str]]:
    """One row for each tenant and outcome, with the requests that lead to it."""
    groups: dict[tuple[str, str, str], list[Json]] = {}
    for difference in differences:
        lost = ", ".join(difference["lost"]) if difference["refused_after"] is None else _REFUSED
        outcome = (difference["project_id"], ", ".join(difference["gained"]), lost)
        groups.setdefault(outcome, []).append(difference)
    rows = []
    for (tenant, gained, lost), found in groups.items():
        plain = [sample for sample in found if not _filters(sample)]
        when = ["anything"] if plain and len(plain) == unfiltered[tenant] else [_declared(sample) for sample in plain]
        when += [_declared(sample) for sample in found if _filters(sample)]
        rows.append((tenant, "; ".join(when), gained, lost))
    return rows


def _filters(sample: Json) -> bool:
    return sample["only"] is not None or bool(sample["ignore"])


def _declared(sample: Json) -> str:
    text = f"{sample['purpose'] or 'no purpose'} in {sample['region'] or 'no region'}"
    if sample["only"] is not None:
        text += f", only {', '.join(sample['only']) or 'public'}"
    if sample["ignore"]:
        text += f", without {', '.join(sample['ignore'])}"
    return text if sample["requests"] == 0 else f"{text} ({sample['requests']} requests)"
