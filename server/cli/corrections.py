"""`flexgate corrections`: correct what a running server owes to an owner; open, decide and list disputes."""

from __future__ import annotations

import enum
import secrets
from typing import Annotated, Any, Final

import typer

from flexgate.experts.cli.api import Api
from flexgate.experts.cli.remote import LOCAL, Url
from flexgate.experts.cli.support import print_table
from flexgate.server.cli.store import failing

_HELP: Final = (
    "Correct what is owed to an owner; open, decide and list disputes. Nothing that was added is changed.\n\n"
    "Exit status: 0 done; 1 refused or failed, the reason is printed; 2 invalid usage."
)
_COLUMNS: Final = ("id", "kind", "owner", "receipt", "amount", "state", "reason")
app = typer.Typer(no_args_is_help=True, add_completion=False, help=_HELP)


class Kind(enum.StrEnum):
    """What is added."""

    CORRECTION = "correction"
    DISPUTE = "dispute"
    REJECTION = "rejection"


Key = Annotated[
    str, typer.Option(envvar="FLEXGATE_KEY", help="API key of an admin, an auditor or an owner.", show_envvar=True)
]
Owner = Annotated[str | None, typer.Option(help="Id of the owner; not needed with an owner's own key.")]


@app.command()
def add(
    kind: Annotated[Kind, typer.Argument(help="Owners open disputes; admins make corrections and rejections.")],
    receipt: Annotated[str, typer.Argument(help="The id of the receipt that it is about.")],
    key: Key,
    reason: Annotated[str, typer.Option(help="Why, in one line of at most 500 characters.")],
    owner: Owner = None,
    amount: Annotated[str | None, typer.Option(help="Of a correction: a decimal number; negative takes off.")] = None,
    currency: Annotated[str | None, typer.Option(help="Of a correction: its code, such as EUR.")] = None,
    dispute: Annotated[str | None, typer.Option(help="The id of the dispute that it decides.")] = None,
    id_: Annotated[str | None, typer.Option("--id", help="Its id; the same again with it adds nothing.")] = None,
    url: Url = LOCAL,
) -> None:
    """Add a correction, a dispute or a rejection, and print its id; it is in the audit log."""
    if kind is Kind.CORRECTION and id_ is None:
        id_ = f"cor_{secrets.token_hex(12)}"
        typer.echo(f"flexgate: if no answer comes, repeat this with --id {id_}, so that it is added once", err=True)
    given: dict[str, Any] = {"kind": kind.value, "receipt_id": receipt, "reason": reason, "owner_id": owner, "id": id_}
    given |= {"amount": amount, "currency": currency, "dispute_id": dispute}
    with failing(), Api(url, key) as api:
        body = {name: value for name, value in given.items() if value is not None}
        typer.echo(api.ask("POST", "/v1/corrections", json=body)["id"])


@app.command(name="list")
def list_(key: Key, owner: Owner = None, url: Url = LOCAL) -> None:
    """List corrections, disputes with their state, and rejections, in the order in which they were added."""
    query: dict[str, Any] = {"limit": 200, **({} if owner is None else {"owner_id": owner})}
    rows: list[tuple[str, ...]] = []
    with failing(), Api(url, key) as api:
        more = True
        while more:
            page = api.ask("GET", "/v1/corrections", params=query)
            rows += map(_row, page["data"])
            more = page["has_more"]
            query["after"] = page["data"][-1]["number"] if more else None
        print_table(_COLUMNS, rows, empty="no corrections")


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    amount = "" if one["amount"] is None else f"{one['amount']} {one['currency']}"
    state = one["state"] or ("" if one["dispute_id"] is None else f"decides {one['dispute_id']}")
    return one["id"], one["kind"], one["owner_id"], one["receipt_id"], amount, state, one["reason"]
