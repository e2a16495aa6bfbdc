"""`flexgate admin-keys`: create and revoke keys of admins, auditors and owners."""

from __future__ import annotations

import enum
from typing import Annotated, Final

import typer

from flexgate.experts.cli.support import print_table
from flexgate.server.cli.store import AsJson, print_json
from flexgate.server.cli.target import READER, Target, administers

_HELP: Final = (
    "Create and revoke keys of admins, auditors and owners.\n\n"
    "Acts on the policy database, or with --url and --key on a running server.\n\n"
    "Exit status: 0 done; 1 refused or failed, the reason is printed; 2 invalid usage."
)
app = typer.Typer(no_args_is_help=True, add_completion=False, help=_HELP)


class KeyRole(enum.StrEnum):
    """What a key may do."""

    ADMIN = "admin"
    AUDITOR = "auditor"
    OWNER = "owner"


@administers(app, "list", roles=READER)
def list_(target: Target, as_json: AsJson = False) -> None:
    """List keys that are not revoked, oldest first."""
    found = target.admin_keys()
    if as_json:
        print_json(found)
        return
    rows = [(key["id"], key["name"], key["owner"]["role"], key["owner"]["id"], key["redacted_value"]) for key in found]
    print_table(("id", "name", "role", "belongs to", "key"), rows, empty="no keys")


@administers(app)
def create(
    target: Target,
    name: Annotated[str, typer.Argument(help="Name of the key, for people.")],
    role: Annotated[KeyRole, typer.Option(help="Role of the key.")] = KeyRole.ADMIN,
    owner: Annotated[str | None, typer.Option(help="The owner's id; required with --role owner.")] = None,
    expires_in_days: Annotated[
        float | None, typer.Option(min=0.001, max=3650, help="Days until the key expires; default: never.")
    ] = None,
) -> None:
    """Create a key and print it; it is shown only once. To rotate, create a second key and revoke the first."""
    seconds = None if expires_in_days is None else round(expires_in_days * 86_400)
    typer.echo(target.create_admin_key(name, role.value, owner, seconds))


@administers(app)
def revoke(target: Target, key_id: Annotated[str, typer.Argument(help="The key's id, as 'list' shows it.")]) -> None:
    """Revoke a key permanently. The last admin key without an expiry date cannot be revoked."""
    target.revoke_admin_key(key_id)
