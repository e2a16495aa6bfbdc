"""`flexgate policy`: the policy as a file, explained, and simulated."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer

from flexgate.experts.cli.support import print_table
from flexgate.policies.explain import ALWAYS
from flexgate.policies.store.gitops import PolicyFile
from flexgate.server.cli import policy_yaml
from flexgate.server.cli.store import DIFFERENT, AsJson, failing, print_json
from flexgate.server.cli.target import READER, Json, Target, administers

_HELP: Final = (
    "Manage the policy as a file, explain what a tenant may use, and simulate changes.\n\n"
    "Acts on the policy database, or with --url and --key on a running server.\n\n"
    "Exit status: 0 success, or no difference; 1 refused or failed, the reason is printed; 2 invalid usage; 3 "
    "`diff` or `simulate` found differences."
)
app = typer.Typer(no_args_is_help=True, add_completion=False, help=_HELP)

_REFUSED: Final = "all requests refused"
_EVERY: Final = "of every request"
File = Annotated[Path, typer.Argument(help="A policy file, YAML or JSON; '-' reads standard input.")]
Prune = Annotated[
    bool, typer.Option(help="Also remove what is not in the file: terminate agreements, delete sets, archive tenants.")
]


@app.command()
def schema() -> None:
    """Print the JSON schema of policy files, for editors and CI."""
    print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **PolicyFile.model_json_schema()})


@administers(app, roles=READER)
def export(
    target: Target,
    version: Annotated[
        int | None, typer.Option(help="Print this policy version instead of the current one.", show_default="current")
    ] = None,
) -> None:
    """Print the policy as a file. Applying that file changes nothing."""
    sys.stdout.write(policy_yaml.dump(target.export_policy(version)))


@administers(app)
def diff(target: Target, file: File, prune: Prune = False, as_json: AsJson = False) -> None:
    """Show what applying a file would change. Exit status 3 if there are differences."""
    changes = target.plan_policy(policy_yaml.load(file), prune=prune)
    _print_changes(changes, as_json, none="nothing would change")
    raise typer.Exit(DIFFERENT if changes else 0)


@administers(app)
def apply(
    target: Target,
    file: File,
    prune: Prune = False,
    dry_run: Annotated[bool, typer.Option(help="Check the file and show the changes, but do not make them.")] = False,
    as_json: AsJson = False,
) -> None:
    """Apply a policy file atomically, as one revision."""
    content = policy_yaml.load(file)
    changes = target.plan_policy(content, prune=prune) if dry_run else target.apply_policy(content, prune=prune)
    _print_changes(changes, as_json, none="nothing would change" if dry_run else "nothing to change")


@administers(app)
def rollback(
    target: Target,
    version: Annotated[int, typer.Argument(min=0, help="The policy version to go back to.")],
    confirm: Annotated[int | None, typer.Option(help="The current policy version; needed to make the change.")] = None,
) -> None:
    """Roll the policy back to an earlier version. Without --confirm: show the changes and exit with status 1."""
    typer.echo(target.roll_back(version, confirm))


@administers(app, roles=READER)
def explain(
    target: Target,
    project: Annotated[str, typer.Argument(help="The tenant's id, as 'flexgate tenants list' shows it.")],
    purpose: Annotated[str | None, typer.Option(help="Explain for requests that declare this purpose.")] = None,
    region: Annotated[str | None, typer.Option(help="Explain for requests that declare this region.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which experts a tenant may use, and for each the reason why or why not."""
    found = target.explain(project, purpose, region)
    if as_json:
        print_json(found)
    else:
        rows = [_row(explanation) for explanation in found["experts"]]
        print_table(("expert", "", "grade", "why"), rows, empty="no experts")
        if found["refusal"] is not None:
            typer.echo(f"Requests are refused ({found['refusal']['code']}): {found['refusal']['message']}")


@administers(app)
def simulate(target: Target, file: File, prune: Prune = False, as_json: AsJson = False) -> None:
    """Show which tenants would gain or lose which experts if a file were applied. Exit status 3 if any tenant would.

    Decides recent requests again under the file, and for each tenant one request without options.
    """
    found = target.simulate(policy_yaml.load(file), prune=prune)
    differences = found["differences"]
    if as_json:
        print_json(differences)
    else:
        rows = _difference_rows(differences, found["unfiltered_samples"])
        print_table(("tenant", "declared", "gains", "loses"), rows, empty="nothing would change for any tenant")
    raise typer.Exit(DIFFERENT if differences else 0)


@app.command()
def check(file: File) -> None:
    """Check a file against the schema, without a database."""
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


def _row(explanation: Json) -> tuple[str, str, str, str]:
    expert, grade = explanation["expert"], explanation["grade"]
    required = ", ".join(_EVERY if rule == ALWAYS else f"by {rule}" for rule in explanation["required_by"])
    if not explanation["allowed"]:
        needed = f" Required {required}: no request is answered without it." if required else ""
        return expert, "excluded", grade, explanation["reason"]["message"] + needed
    until = explanation["until"]
    ends = "" if until is None else f" until {datetime.fromtimestamp(until, UTC):%Y-%m-%dT%H:%M:%SZ}"
    needed = f"; required {required}" if required else ""
    return expert, "allowed", grade, "by " + ", ".join(explanation["permitted_by"]) + ends + needed


def _difference_rows(differences: list[Json], unfiltered: dict[str, int]) -> list[tuple[str, str, str, str]]:
    """One row per tenant and outcome, with the requests that have it."""
    groups: dict[tuple[str, str, str], list[Json]] = {}
    for difference in differences:
        lost = ", ".join(difference["lost"]) if difference["refused_after"] is None else _REFUSED
        outcome = (difference["project_id"], ", ".join(difference["gained"]), lost)
        groups.setdefault(outcome, []).append(difference)
    rows = []
    for (tenant, gained, lost), found in groups.items():
        plain = [sample for sample in found if not _filters(sample)]
        when = (
            ["any purpose and region"]
            if plain and len(plain) == unfiltered[tenant]
            else [_declared(sample) for sample in plain]
        )
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
