"""`/v1/statements/{period}`: what an owner's experts did, and what is owed for it. To an owner, only its own exist."""

from __future__ import annotations

from typing import Any, Final

from flexgate.policies.store.audit import count_denied
from flexgate.policies.store.ownership import read_ownership
from flexgate.policies.store.pseudonyms import read_pseudonyms
from flexgate.server.admin.operation import Call, Nothing
from flexgate.server.admin.router import OperationRouter
from flexgate.server.admin.statements.account import account_of, closing_of, require_known
from flexgate.server.admin.statements.asked import (
    ROLES,
    Deadline,
    advice,
    is_open,
    latest,
    owner_of,
    period_of,
)
from flexgate.server.admin.statements.changes import changes_of
from flexgate.server.admin.statements.documents import Document, csv_of, page_of
from flexgate.server.admin.statements.schemas import (
    PeriodList,
    ShowStatement,
    Statement,
    shown_period,
    statement_of,
)
from flexgate.server.http.refusals import from_ledger
from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.reading import Local
from flexgate.server.ledger.statements import Period, first_end
from flexgate.server.policy.executors import STATEMENTS

router: Final = OperationRouter()


@router.operation("GET", "/v1/statements", roles=ROLES, threads=STATEMENTS)
def list_periods(call: Call[Nothing, Nothing]) -> PeriodList:
    """List the months that there are statements of, the newest first; one that is open can still grow."""
    path = call.services.ledger.path
    try:
        first, whole = first_end(path), Local(path).whole_since()
    except LedgerError as error:
        raise from_ledger(error, param="period") from error
    found, period = [], Period.at("month", latest(call))
    while first is not None and period.end > first and period.start >= whole:
        found.append(shown_period(period, is_open=is_open(call, period)))
        period = Period.at("month", period.start - 1)
    return PeriodList(data=found)


@router.operation("GET", "/v1/statements/{period}", roles=ROLES, threads=STATEMENTS)
def show(call: Call[Nothing, ShowStatement]) -> Statement | Document:
    """Show an owner's statement of a day or month in UTC: requests, tokens, amounts, denials, rights."""
    owner, period = owner_of(call), period_of(call)
    statement = _made(call, owner, period)
    if call.query.format == "csv":
        return csv_of(statement)
    return page_of(statement) if call.query.format == "html" else statement


def _made(call: Call[Any, Any], owner: str, period: Period) -> Statement:
    store, closing, open_ = call.store, closing_of(call, owner, period), is_open(call, period)
    account = account_of(call, owner, period)
    ownership = read_ownership(store, owner)
    require_known(call, owner, account, ownership)
    try:
        denials = count_denied(store.engine, period.start, period.end, ownership.had, each=Deadline().require)
        changes = changes_of(store, owner, ownership, period, account)
    except LedgerError as error:
        raise from_ledger(error, param="period", advice=advice(period)) from error
    return statement_of(
        period,
        owner,
        account,
        now=call.now,
        is_open=open_ and closing is None,
        name_of=read_pseudonyms(store.engine, owner).of,
        denials=denials,
        changes=changes,
        closing=closing,
    )
