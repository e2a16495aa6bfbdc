"""`flexgate policy`: the policy as a file, why it gives what it gives, and what a file would change."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer

from flexgate.experts.cli_support import print_table
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.explain import Explanation
from flexgate.policies.explain import explain as explain_policy
from flexgate.policies.simulate import Difference, Replay, with_standard
from flexgate.policies.simulate import simulate as simulate_policy
from flexgate.policies.store import gitops, history
from flexgate.policies.store.gitops import PolicyFile
from flexgate.policies.store.revisions import ObjectChange
from flexgate.server import policy_yaml, recorded
from flexgate.server.admin.policy.schemas import change_object, difference_object, explanation_object
from flexgate.server.cli_store import (
    DIFFERENT,
    AsJson,
    DatabaseUrl,
    Demo,
    StateDir,
    actor,
    failing,
    opened,
    print_json,
)

_HELP: Final = (
    "The policy as a file, why it gives what it gives, and what a file would change.\n\n"
    "Exit status: 0 done, or no difference; 1 refused or failed, with one sentence; 2 wrong usage; 3 "
    "`diff` and `simulate` found differences."
)
app = typer.Typer(no_args_is_help=True, add_completion=False, help=_HELP)

File = Annotated[Path, typer.Argument(help="A policy file, YAML or JSON; '-' reads standard input.")]
Prune = Annotated[bool, typer.Option(help="Also end agreements, remove sets and archive tenants the file lacks.")]


@app.command()
def schema() -> None:
    """Print the JSON schema of policy files, for editors and CI."""
    print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **PolicyFile.model_json_schema()})


@app.command()
def export(
    version: Annotated[int | None, typer.Option(help="As it was at this policy version.", show_default="now")] = None,
    demo: Demo = None,
    state_dir: StateDir = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Print the policy as a file. Applied again, it changes nothing."""
    with opened(demo, state_dir, database_url) as store:
        sys.stdout.write(policy_yaml.dump(gitops.export(store, version)))


@app.command()
def diff(
    file: File,
    prune: Prune = False,
    as_json: AsJson = False,
    demo: Demo = None,
    state_dir: StateDir = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Say what applying a file would change. Exit status 3 if anything."""
    with opened(demo, state_dir, database_url) as store:
        changes = gitops.plan(store, policy_yaml.load(file), prune=prune).changes
    _print_changes(changes, as_json, none="nothing would change")
    raise typer.Exit(DIFFERENT if changes else 0)


@app.command()
def apply(
    file: File,
    prune: Prune = False,
    dry_run: Annotated[bool, typer.Option(help="Check everything and change nothing.")] = False,
    as_json: AsJson = False,
    demo: Demo = None,
    state_dir: StateDir = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Make the policy say what a file says, in one revision, or not at all."""
    with opened(demo, state_dir, database_url) as store:
        content = policy_yaml.load(file)
        if dry_run:
            changes = gitops.plan(store, content, prune=prune).changes
        else:
            changes = gitops.apply(store, content, actor=actor(), at=time.time(), prune=prune)
    _print_changes(changes, as_json, none="nothing would change" if dry_run else "nothing to change")


@app.command()
def rollback(
    version: Annotated[int, typer.Argument(min=0, help="The policy version that comes back.")],
    confirm: Annotated[int | None, typer.Option(help="The present version: says that it is meant.")] = None,
    demo: Demo = None,
    state_dir: StateDir = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Make the policy say what it said at a version. Without --confirm, only say what would change, and fail."""
    with opened(demo, state_dir, database_url) as store:
        typer.echo(history.roll_back(store, version, confirm=confirm, actor=actor(), at=time.time()))


@app.command()
def explain(
    project: Annotated[str, typer.Argument(help="The tenant's id, as 'flexgate tenants list' shows it.")],
    purpose: Annotated[str | None, typer.Option(help="What requests would declare.")] = None,
    region: Annotated[str | None, typer.Option(help="Where requests would say they are.")] = None,
    as_json: AsJson = False,
    demo: Demo = None,
    state_dir: StateDir = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Say which experts a tenant may use, and why, or why not and what would change it."""
    with opened(demo, state_dir, database_url) as store:
        request = DecisionRequest(decision_id="explain", purpose=purpose, region=region)
        found = explain_policy(store.snapshot(), project, request, time.time())
    if as_json:
        print_json([explanation_object(explanation) for explanation in found])
    else:
        print_table(("expert", "", "why"), [_row(explanation) for explanation in found], empty="no experts")


@app.command()
def simulate(
    file: File,
    prune: Prune = False,
    as_json: AsJson = False,
    demo: Demo = None,
    state_dir: StateDir = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Say which tenants would gain or lose what, if a file were applied. Exit status 3 if any.

    Asked again are requests of late, and what a request would get that asks for nothing special.
    """
    with opened(demo, state_dir, database_url) as store:
        plan = gitops.plan(store, policy_yaml.load(file), prune=prune)
        now = time.time()
        replays = with_standard(recorded.replays(store, now), plan.current, plan.proposed, now)
    differences = simulate_policy(plan.current, plan.proposed, replays)
    if as_json:
        print_json([difference_object(difference) for difference in differences])
    else:
        rows = _difference_rows(differences, replays)
        print_table(("tenant", "when declaring", "gains", "loses"), rows, empty="nothing would change for any tenant")
    raise typer.Exit(DIFFERENT if differences else 0)


@app.command()
def check(file: File) -> None:
    """Check a file's form without any database."""
    with failing():
        policy_yaml.load(file, stored=False)


def _print_changes(changes: list[ObjectChange], as_json: bool, *, none: str) -> None:
    if as_json:
        print_json([change_object(change) for change in changes])
    else:
        print_table(("change", "kind", "id", "fields"), [_change_row(change) for change in changes], empty=none)


def _change_row(change: ObjectChange) -> tuple[str, str, str, str]:
    before, after = change.before or {}, change.after or {}
    fields = ", ".join(name for name in {**before, **after} if before.get(name) != after.get(name))
    if change.before is None:
        return "add", change.kind, change.object_id, ""
    return (
        ("remove", change.kind, change.object_id, "")
        if change.after is None
        else ("change", change.kind, change.object_id, fields)
    )


def _row(explanation: Explanation) -> tuple[str, str, str]:
    if explanation.refused is not None:
        return explanation.expert, "excluded", explanation.refused.message
    until = explanation.until
    ends = (
        "" if until is None or until == math.inf else f" until {datetime.fromtimestamp(until, UTC):%Y-%m-%dT%H:%M:%SZ}"
    )
    return explanation.expert, "allowed", "by " + ", ".join(explanation.permitted_by) + ends


def _difference_rows(differences: list[Difference], replays: list[Replay]) -> list[tuple[str, str, str, str]]:
    """One row for each tenant and outcome, with the requests that lead to it."""
    asked = Counter(replay.tenant_id for replay in replays if not _narrows(replay))
    groups: dict[tuple[str, str, str], list[Replay]] = {}
    for difference in differences:
        lost = ", ".join(difference.lost) if difference.refused_after is None else "everything: refused from then on"
        outcome = (difference.replay.tenant_id, ", ".join(difference.gained), lost)
        groups.setdefault(outcome, []).append(difference.replay)
    rows = []
    for (tenant, gained, lost), found in groups.items():
        plain = [replay for replay in found if not _narrows(replay)]
        when = ["anything"] if plain and len(plain) == asked[tenant] else [_declared(replay) for replay in plain]
        when += [_declared(replay) for replay in found if _narrows(replay)]
        rows.append((tenant, "; ".join(when), gained, lost))
    return rows


def _narrows(replay: Replay) -> bool:
    return replay.request.only is not None or bool(replay.request.ignore)


def _declared(replay: Replay) -> str:
    request = replay.request
    said = f"{request.purpose or 'no purpose'} in {request.region or 'no region'}"
    if request.only is not None:
        said += f", only {', '.join(request.only) or 'public'}"
    if request.ignore:
        said += f", without {', '.join(request.ignore)}"
    return said if replay.times == 0 else f"{said} ({replay.times} requests)"
