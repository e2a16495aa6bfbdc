"""`flexgate sets`: named sets of experts."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from flexgate.experts.cli.support import print_table
from flexgate.server.cli.store import AsJson, print_json
from flexgate.server.cli.target import READER, Target, administers

_HELP: Final = (
    "Create, change and delete named sets of experts, for agreements, tenants and requests.\n\n"
    "Acts on the policy database, or with --url and --key on a running server.\n\n"
    "Exit status: 0 done; 1 refused or failed, the reason is printed; 2 invalid usage."
)
app = typer.Typer(no_args_is_help=True, add_completion=False, help=_HELP)

SetId = Annotated[str, typer.Argument(help="The set's id, such as set:science.")]
Experts = Annotated[list[str], typer.Argument(help="Ids of the set's experts, all of them.")]


@administers(app, "list", roles=READER)
def list_(target: Target, as_json: AsJson = False) -> None:
    """List the sets, oldest first."""
    found = target.sets()
    if as_json:
        print_json(found)
    else:
        print_table(("id", "experts"), [(one["id"], ", ".join(one["experts"])) for one in found], empty="no sets")


@administers(app)
def create(target: Target, set_id: SetId, experts: Experts) -> None:
    """Create a set."""
    target.create_set(set_id, experts)


@administers(app)
def change(target: Target, set_id: SetId, experts: Experts) -> None:
    """Replace the experts of a set. Agreements and tenants that name the set then mean these."""
    target.change_set(set_id, experts)


@administers(app)
def delete(target: Target, set_id: SetId) -> None:
    """Delete a set. One that an agreement, tenant or list names is not deleted."""
    target.delete_set(set_id)
