"""`flexgate statements`: how an owner's experts were used on a running server, and what is owed for it."""

from __future__ import annotations

import enum
import sys
from typing import Annotated, Any, Final
from urllib.parse import quote

import typer

from flexgate.experts.cli.api import Api
from flexgate.experts.cli.remote import LOCAL, Url
from flexgate.experts.cli.support import print_table
from flexgate.server.cli.money import cost_of
from flexgate.server.cli.receipts import canonical
from flexgate.server.cli.store import failing

_HELP: Final = (
    "Show how an owner's experts were used in a day or month (UTC), what is owed for it, and the receipts of it.\n\n"
    "Exit status: 0 done; 1 refused or failed, the reason is printed; 2 invalid usage."
)
_COLUMNS: Final = ("agreement", "expert", "requests", "tokens", "share-weighted tokens", "amount")
app = typer.Typer(no_args_is_help=True, add_completion=False, help=_HELP)


class Format(enum.StrEnum):
    """How a statement is printed."""

    TEXT = "text"
    JSON = "json"
    CSV = "csv"
    HTML = "html"


Period = Annotated[str, typer.Argument(help="A month or a day, such as 2026-11 or 2026-11-30.")]
Key = Annotated[
    str, typer.Option(envvar="FLEXGATE_KEY", help="API key of the owner, an admin or an auditor.", show_envvar=True)
]
Operator = Annotated[str, typer.Option(envvar="FLEXGATE_KEY", help="API key of an admin or auditor.", show_envvar=True)]
Owner = Annotated[str | None, typer.Option(help="Id of the owner; not needed with an owner's own key.")]
_PAGE: Final = 200


@app.command()
def show(
    period: Period,
    key: Key,
    owner: Owner = None,
    form: Annotated[Format, typer.Option("--format", help="What to print.")] = Format.TEXT,
    url: Url = LOCAL,
) -> None:
    """Print an owner's statement of a period."""
    path, query = _path(period), _of(owner)
    with failing(), Api(url, key) as api:
        if form is Format.TEXT:
            _print(api.ask("GET", path, params=query))
        else:
            sys.stdout.write(api.text("GET", path, params={**query, "format": form.value}))


@app.command(name="list")
def list_(key: Key, url: Url = LOCAL) -> None:
    """List the months that there are statements of; those of a month that is still open are provisional."""
    with failing(), Api(url, key) as api:
        months = api.ask("GET", "/v1/statements")["data"]
        rows = [(month["id"], "open, provisional" if month["open"] else "over") for month in months]
        print_table(("month", "state"), rows, empty="no uses")


@app.command()
def sign(period: Period, key: Key, owner: Owner = None, url: Url = LOCAL) -> None:
    """Print what is owed to an owner, signed, for 'flexgate receipts verify'; of an open period it is provisional."""
    with failing(), Api(url, key) as api:
        sys.stdout.write(canonical(api.ask("GET", f"{_path(period)}/signed", params=_of(owner))))


@app.command()
def owners(period: Period, key: Operator, url: Url = LOCAL) -> None:
    """Print the signed sums of all owners, with each owner's part, for 'flexgate receipts verify'."""
    with failing(), Api(url, key) as api:
        sys.stdout.write(canonical(api.ask("GET", f"{_path(period)}/owners")))


@app.command()
def receipts(
    period: Period,
    key: Key,
    owner: Owner = None,
    after: Annotated[int, typer.Option(min=0, help="Print only receipts after this number.")] = 0,
    url: Url = LOCAL,
) -> None:
    """Print an owner's copies of its receipts of a period as JSON Lines, for 'flexgate receipts verify'."""
    with failing(), Api(url, key) as api:
        more = True
        while more:
            query = {**_of(owner), "after": after, "limit": _PAGE}
            page = api.ask("GET", f"{_path(period)}/receipts", params=query)
            for receipt in page["data"]:
                sys.stdout.write(canonical(receipt))
                after = int(receipt["number"])
            more = page["has_more"]


@app.command()
def prove(
    period: Period,
    receipt: Annotated[str, typer.Argument(help="The receipt's id.")],
    key: Key,
    owner: Owner = None,
    last: Annotated[int | None, typer.Option(min=0, help="'last' of a provisional statement.")] = None,
    url: Url = LOCAL,
) -> None:
    """Print the proof that a signed statement counts a receipt, for 'flexgate receipts verify'."""
    query: dict[str, Any] = _of(owner) if last is None else {**_of(owner), "last": last}
    with failing(), Api(url, key) as api:
        path = f"{_path(period)}/receipts/{quote(receipt, safe='')}"
        sys.stdout.write(canonical(api.ask("GET", path, params=query)))


@app.command()
def close(
    period: Annotated[str, typer.Argument(help="A month that is over, such as 2026-11.")],
    key: Annotated[str, typer.Option(envvar="FLEXGATE_KEY", help="API key of an admin.", show_envvar=True)],
    owner: Annotated[str, typer.Option(help="Id of the owner.")],
    minimum: Annotated[
        list[str] | None, typer.Option(metavar="COST", help="The least that is paid, such as '50 EUR'; repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Print what would be due and carried over, and close nothing.")] = False,
    leave_out_deleted: Annotated[
        bool, typer.Option(help="Leave out months before it whose usage was deleted before they were closed.")
    ] = False,
    url: Url = LOCAL,
) -> None:
    """Close an owner's month, once and for good: print what is due, and what is carried over to the next month."""
    minimums = [cost_of(one) for one in minimum or ()]
    body = {"owner_id": owner, "minimums": minimums, "leave_out_deleted": leave_out_deleted}
    with failing(), Api(url, key) as api:
        _print_payouts(api.ask("POST", f"{_path(period)}/closing{'/preview' * dry_run}", json=body))


@app.command()
def due(period: Period, key: Key, owner: Owner = None, url: Url = LOCAL) -> None:
    """Print what is due of a closed month, and what was carried over, also after its usage was deleted."""
    with failing(), Api(url, key) as api:
        _print_payouts(api.ask("GET", f"{_path(period)}/closing", params=_of(owner)))


def _path(period: str) -> str:
    return f"/v1/statements/{quote(period, safe='')}"


def _of(owner: str | None) -> dict[str, str]:
    return {} if owner is None else {"owner_id": owner}


def _print(statement: dict[str, Any]) -> None:
    state = ", still open: provisional" if statement["open"] else ""
    requests, tokens = statement["requests"], statement["tokens"]
    typer.echo(f"{statement['owner_id']}, {statement['id']}{state}: {requests:,} requests, {tokens:,} tokens")
    print_table(_COLUMNS, [_row(line) for line in statement["lines"]], empty="no uses")
    for one in statement["corrections"]:
        typer.echo(f"correction {one['correction_id']}: {one['amount']} {one['currency']}, {one['reason']}")
    for total in statement["totals"]:
        typer.echo(f"total {total['amount']} {total['currency']}")
    if statement["closing"] is not None:
        _print_payouts(statement["closing"])


def _print_payouts(closing: dict[str, Any]) -> None:
    if closing["closed_at"] is None:
        typer.echo(f"{closing['id']} would be closed:")
    if closing["left_out"]:
        typer.echo(f"left out, since their usage had been deleted: {', '.join(closing['left_out'])}")
    for one in closing["payouts"]:
        currency = one["currency"]
        typer.echo(
            f"due {one['due']} {currency}: {one['carried']} carried over and {one['total']} of {closing['id']}, less "
            f"{one['carried_on']} carried on; the least that is paid is {one['minimum']} {currency}"
        )
    if not closing["payouts"]:
        typer.echo(f"nothing is due for {closing['id']}")


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
