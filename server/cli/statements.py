"""`flexgate statements`: what an owner's experts did on a running server, and what is owed for it."""

from __future__ import annotations

import enum
import sys
from typing import Annotated, Any, Final
from urllib.parse import quote

import typer

from flexgate.experts.cli.api import Api
from flexgate.experts.cli.remote import LOCAL, Url
from flexgate.experts.cli.support import print_table
from flexgate.server.cli.store import failing

_HELP: Final = (
    "Show what an owner's experts did in a day or month, in UTC, and what is owed for it.\n\n"
    "Exit status: 0 done; 1 refused or failed, with one sentence; 2 wrong usage."
)
_COLUMNS: Final = ("agreement", "expert", "requests", "tokens", "share-weighted tokens", "amount")
app = typer.Typer(no_args_is_help=True, add_completion=False, help=_HELP)


class Format(enum.StrEnum):
    """How a statement is printed."""

    TEXT = "text"
    JSON = "json"
    CSV = "csv"
    HTML = "html"


@app.callback()
def _statements() -> None:
    """Keep `show` a command of its own."""


@app.command()
def show(
    period: Annotated[str, typer.Argument(help="A month or a day, such as 2026-11 or 2026-11-30.")],
    key: Annotated[
        str, typer.Option(envvar="FLEXGATE_KEY", help="API key of the owner, an admin or an auditor.", show_envvar=True)
    ],
    owner: Annotated[str | None, typer.Option(help="The owner; an owner's own key needs none.")] = None,
    form: Annotated[Format, typer.Option("--format", help="What to print.")] = Format.TEXT,
    url: Url = LOCAL,
) -> None:
    """Print an owner's statement of a period."""
    query = {} if owner is None else {"owner_id": owner}
    path = f"/v1/statements/{quote(period, safe='')}"
    with failing(), Api(url, key) as api:
        if form is Format.TEXT:
            _print(api.ask("GET", path, params=query))
        else:
            sys.stdout.write(api.text("GET", path, params={**query, "format": form.value}))


def _print(statement: dict[str, Any]) -> None:
    state = ", still open" if statement["open"] else ""
    requests, tokens = statement["requests"], statement["tokens"]
    typer.echo(f"{statement['owner_id']}, {statement['id']}{state}: {requests:,} requests, {tokens:,} tokens")
    print_table(_COLUMNS, [_row(line) for line in statement["lines"]], empty="no uses")
    for total in statement["totals"]:
        typer.echo(f"total {total['amount']} {total['currency']}")


def _row(line: dict[str, Any]) -> tuple[str, ...]:
    unrecorded = line["agreement_id"] is None
    return (
        "not recorded" if unrecorded else f"{line['agreement_id']}@{line['agreement_version']}",
        line["expert_id"],
        f"{line['requests']:,}",
        f"{line['tokens']:,}",
        line["share_weighted_tokens"],
        "" if line["amount"] is None else f"{line['amount']} {line['currency']}",
    )
