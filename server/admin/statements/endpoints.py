"""`/v1/statements/{period}`: what an owner's experts did, and what is owed for it. To an owner, only its own exist."""

from __future__ import annotations

from typing import Any, Final

from flexgate.policies.audit import Event
from flexgate.policies.documents import Role
from flexgate.policies.store.audit import count_denied
from flexgate.policies.store.ownership import Ownership, read_ownership
from flexgate.policies.store.pseudonyms import read_pseudonyms
from flexgate.server.admin.operation import Call, Nothing
from flexgate.server.admin.router import OperationRouter
from flexgate.server.admin.statements.asked import (
    INVALID,
    ROLES,
    Deadline,
    advice,
    is_open,
    owner_of,
    period_of,
    require_whole,
)
from flexgate.server.admin.statements.changes import changes_of
from flexgate.server.admin.statements.documents import Document, csv_of, page_of
from flexgate.server.admin.statements.schemas import (
    ClosedMonth,
    CloseMonth,
    PeriodList,
    ShowStatement,
    Statement,
    closed_month,
    shown_period,
    statement_of,
)
from flexgate.server.http.errors import Invalid
from flexgate.server.http.refusals import from_ledger
from flexgate.server.http.responses import CREATED
from flexgate.server.ledger.closings import Closing, ClosingRefused, Closings
from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.reading import Local
from flexgate.server.ledger.statements import Account, Period, first_end, owner_uses
from flexgate.server.ledger.terms import terms_of
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
    found, period = [], Period.at("month", call.now)
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


@router.operation("POST", "/v1/statements/{period}/closing", roles=(Role.ADMIN,), threads=STATEMENTS, status=CREATED)
def close(call: Call[CloseMonth, Nothing]) -> ClosedMonth:
    """Close an owner's month that is over, once: what is less than a minimum is carried over to the next."""
    period, body = period_of(call), call.body
    if period.kind != "month" or is_open(call, period):
        raise Invalid(
            f"'{period.name}' is no month that is over: close months, in their order, once they have ended.",
            param="period",
            code=INVALID,
        )
    account = _account(call, body.owner_id, period)
    _require_known(call, body.owner_id, account, read_ownership(call.store, body.owner_id))

    def audit(row: Closing) -> None:
        detail = {"owner": row.owner, "period": row.period, "payouts": [one._asdict() for one in row.payouts]}
        call.store.record([Event(at=call.now, actor=call.principal.key_id, action="statement.closed", detail=detail)])

    try:
        closed = Closings(call.services.ledger.corrections).close(
            body.owner_id,
            period,
            account.totals,
            body.by_currency,
            at=call.now,
            actor=call.principal.key_id,
            audit=audit,
        )
    except ClosingRefused as error:
        text = str(error)
        raise Invalid(f"{text[:1].upper()}{text[1:]}.", param="period", code="closing_refused") from error
    except LedgerError as error:
        raise from_ledger(error, param="period") from error
    return closed_month(closed)


def _account(call: Call[Any, Any], owner: str, period: Period) -> Account:
    try:
        found = owner_uses(call.services.ledger.path, owner, period)
        require_whole(call, period)
        return found.account(terms_of(call.store, found.counted_under))
    except LedgerError as error:
        raise from_ledger(error, param="period", advice=advice(period)) from error


def _require_known(call: Call[Any, Any], owner: str, account: Account, ownership: Ownership) -> None:
    if not (ownership.times or account.lines) and call.principal.owner_id is None:
        raise Invalid(f"No expert of this server has the owner '{owner}'.", param="owner_id", code=INVALID)


def _closing(call: Call[Any, Any], owner: str, period: Period) -> Closing | None:
    try:
        return Closings(call.services.ledger.corrections).find(owner, period)
    except LedgerError as error:
        raise from_ledger(error, param="period") from error


def _made(call: Call[Any, Any], owner: str, period: Period) -> Statement:
    store, open_ = call.store, is_open(call, period)
    account = _account(call, owner, period)
    ownership = read_ownership(store, owner)
    _require_known(call, owner, account, ownership)
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
        is_open=open_,
        name_of=read_pseudonyms(store.engine, owner).of,
        denials=denials,
        changes=changes,
        closing=_closing(call, owner, period),
    )
