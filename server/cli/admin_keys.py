"""`flexgate admin-keys`: hand out and revoke the keys of administrators, auditors and owners."""

from __future__ import annotations

import enum
from typing import Annotated, Final

import typer

from flexgate.experts.cli.support import print_table
from flexgate.server.cli.store import AsJson, print_json
from flexgate.server.cli.target import Target, administers

_HELP: Final = (
    "Hand out and revoke the keys of administrators, auditors and owners.\n\n"
    "Acts on the policy database, or with --url and --key on a running server.\n\n"
    "Exit status: 0 done; 1 refused or failed, with one sentence; 2 wrong usage."
)
app = typer.Typer(no_args_is_help=True, add_completion=False, help=_HELP)


class KeyRole(enum.StrEnum):
    """What a key may do."""

    ADMIN = "admin"
    AUDITOR = "auditor"
    OWNER = "owner"


@administers(app, "list")
def list_(target: Target, as_json: AsJson = False) -> None:
    """List keys that are not revoked, oldest first."""
    found = target.admin_keys()
    if as_json:
        print_json(found)
        return
    rows = [(key["id"], key["name"], key["owner"]["role"], key["owner"]["id"], key["redacted_value"]) for key in found]
    print_table(("id", "name", "role", "of", "key"), rows, empty="no keys")


@administers(app)
def create(
    target: Target,
    name: Annotated[str, typer.Argument(help="Who will use the key.")],
    role: Annotated[KeyRole, typer.Option(help="What the key may do.")] = KeyRole.ADMIN,
    owner: Annotated[str | None, typer.Option(help="With --role owner: the owner's id.")] = None,
    expires_in_days: Annotated[float | None, typer.Option(min=0.001, max=3650, help="Without it, never.")] = None,
) -> None:
    """Create a key and print it, this once. To rotate, create a second one and revoke the first."""
    seconds = None if expires_in_days is None else round(expires_in_days * 86_400)
    typer.echo(target.create_admin_key(name, role.value, owner, seconds))


@administers(app)
def revoke(target: Target, key_id: Annotated[str, typer.Argument(help="The key's id, as 'list' shows it.")]) -> None:
    """Revoke a key for good. The last admin key that does not expire is kept."""
    target.revoke_admin_key(key_id)
