"""`/v1/statements/{period}`: what an owner's experts did, and what is owed for it. To an owner, only its own exist."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from flexgate.policies.documents import Role
from flexgate.policies.store.audit import count_denied
from flexgate.policies.store.ownership import read_ownership
from flexgate.policies.store.pseudonyms import read_pseudonyms
from flexgate.server.admin.operation import Call, Nothing
from flexgate.server.admin.router import OperationRouter
from flexgate.server.admin.statements.changes import changes_of
from flexgate.server.admin.statements.documents import Document, csv_of, page_of
from flexgate.server.admin.statements.schemas import ShowStatement, Statement, statement_of
from flexgate.server.http.errors import Invalid
from flexgate.server.http.refusals import from_ledger, not_found
from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.reading import Local
from flexgate.server.ledger.statements import Period, owner_uses
from flexgate.server.ledger.terms import terms_of
from flexgate.server.policy.executors import STATEMENTS

_INVALID: Final = "invalid_value"
router: Final = OperationRouter()


@router.operation("GET", "/v1/statements/{period}", roles=(Role.ADMIN, Role.AUDITOR, Role.OWNER), threads=STATEMENTS)
def show(call: Call[Nothing, ShowStatement]) -> Statement | Document:
    """Show an owner's statement of a day or month in UTC: requests, tokens, amounts, denials, rights."""
    owner, period = _owner(call), Period.of(call.path["period"])
    if period is None:
        raise Invalid(
            "The period is a day or a month, such as '2026-11-30' or '2026-11'.", param="period", code=_INVALID
        )
    if call.now < period.start:
        raise Invalid(f"The period '{period.name}' has not begun.", param="period", code=_INVALID)
    statement = _made(call, owner, period)
    if call.query.format == "csv":
        return csv_of(statement)
    return page_of(statement) if call.query.format == "html" else statement


def _owner(call: Call[Any, ShowStatement]) -> str:
    own, asked = call.principal.owner_id, call.query.owner_id
    if own is None and asked is None:
        raise Invalid("Name the owner in 'owner_id'.", param="owner_id", code=_INVALID)
    if own is not None and asked not in (None, own):
        raise not_found()
    return str(asked or own)


def _made(call: Call[Any, Any], owner: str, period: Period) -> Statement:
    store, ledger = call.store, call.services.ledger
    written_down = ledger.has_written(period.end)  # asked before the ledger is read
    try:
        found = owner_uses(ledger.path, owner, period)
        whole = Local(ledger.path).whole_since()  # asked after it was read
        if period.start < whole:
            since = datetime.fromtimestamp(whole, UTC).date()
            message = f"Usage of the period '{period.name}' was deleted (--usage-days): it is whole since {since}."
            raise Invalid(message, param="period", code="usage_deleted")
        account = found.account(terms_of(store, found.counted_under))
    except LedgerError as error:
        advice = "ask for its days" if period.kind == "month" else "ask an administrator for its costs"
        raise from_ledger(error, param="period", advice=advice) from error
    ownership = read_ownership(store, owner)
    if not (ownership.times or account.lines) and call.principal.owner_id is None:
        raise Invalid(f"No expert of this server has the owner '{owner}'.", param="owner_id", code=_INVALID)
    return statement_of(
        period,
        owner,
        account,
        now=call.now,
        written_down=written_down,
        name_of=read_pseudonyms(store.engine, owner).of,
        denials=count_denied(store.engine, period.start, period.end, ownership.had),
        changes=changes_of(store, owner, ownership, period, account),
    )
