"""`flexgate agreements`: create, show, revise and terminate agreements."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from flexgate.experts.cli.support import print_table
from flexgate.policies.errors import ChangeRefused, ObjectUnknown
from flexgate.policies.strict_json import no_key_twice
from flexgate.server.cli.store import AsJson, print_json
from flexgate.server.cli.target import Json, Target, administers

_HELP: Final = (
    "Create, show, revise and terminate agreements.\n\n"
    "Acts on the policy database, or with --url and --key on a running server.\n\n"
    "Exit status: 0 done; 1 refused or failed, the reason is printed; 2 invalid usage."
)
app = typer.Typer(no_args_is_help=True, add_completion=False, help=_HELP)

Agreement = Annotated[str, typer.Argument(help="The agreement's id, as 'list' shows it.")]
AgreementFile = Annotated[Path, typer.Argument(help="JSON file with the agreement; '-' reads standard input.")]


@administers(app, "list", roles="admin, auditor or owner")
def list_(target: Target, as_json: AsJson = False) -> None:
    """List agreements, oldest first, future and expired ones included. Terminated ones are left out."""
    found = target.agreements()
    if as_json:
        print_json(found)
    else:
        header = ("id", "version", "owner", "experts", "assignee", "effect")
        print_table(header, [_row(agreement) for agreement in found], empty="no agreements")


@administers(app, roles="admin, auditor or owner")
def show(target: Target, agreement: Agreement) -> None:
    """Print an agreement as JSON."""
    for found in target.agreements():
        if found["id"] == agreement:
            print_json(found)
            return
    raise ObjectUnknown(f"there is no agreement '{agreement}'")


@administers(app, roles="admin or owner")
def create(target: Target, file: AgreementFile) -> None:
    """Create an agreement from a JSON file and print its id."""
    typer.echo(target.put_agreement(None, _read(file))["id"])


@administers(app, roles="admin or owner")
def revise(target: Target, agreement: Agreement, file: AgreementFile) -> None:
    """Replace an agreement as a whole with the one in a JSON file, and print its new version."""
    typer.echo(target.put_agreement(agreement, _read(file))["version"])


@administers(app, roles="admin or owner")
def terminate(target: Target, agreement: Agreement) -> None:
    """Terminate an agreement now. It stays in the history of the policy."""
    target.terminate_agreement(agreement)


def _read(path: Path) -> Json:
    text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    try:
        fields = json.loads(text, object_pairs_hook=no_key_twice)
    except (ValueError, RecursionError) as error:
        raise ChangeRefused(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ChangeRefused(f"{path} must hold one JSON object, the agreement")
    return fields


def _row(agreement: Json) -> tuple[str, ...]:
    experts = ", ".join(sorted(agreement["experts"]))
    return (
        agreement["id"],
        str(agreement["version"]),
        agreement["owner"],
        experts,
        agreement["assignee"],
        agreement["effect"],
    )
