"""`/v1/statements/{period}/closing`: what is due of a month that is over, and what is carried over to the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from flexgate.policies.audit import Event
from flexgate.policies.documents import Role
from flexgate.policies.store.ownership import read_ownership
from flexgate.server.admin.operation import Call, Nothing
from flexgate.server.admin.router import OperationRouter
from flexgate.server.admin.statements.account import account_of, closing_of, require_known
from flexgate.server.admin.statements.asked import INVALID, ROLES, is_open, latest, owner_of, period_of
from flexgate.server.admin.statements.schemas import ClosedMonth, CloseMonth, OfOwner, closed_month
from flexgate.server.http.errors import Invalid, NotFound
from flexgate.server.http.refusals import from_ledger
from flexgate.server.http.responses import CREATED
from flexgate.server.ledger.closings import Closing, ClosingRefused, Closings, Month, Summed
from flexgate.server.ledger.entries import MICROSECONDS
from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.reading import Local
from flexgate.server.ledger.statements import Period, first_end
from flexgate.server.policy.executors import STATEMENTS

_PATH: Final = "/v1/statements/{period}/closing"
router: Final = OperationRouter()


@router.operation("GET", _PATH, roles=ROLES, threads=STATEMENTS)
def show_closing(call: Call[Nothing, OfOwner]) -> ClosedMonth:
    """Show the closing of an owner's month, also after its usage was deleted."""
    owner, period = owner_of(call), period_of(call)
    found = closing_of(call, owner, period)
    if found is None:
        raise NotFound(f"'{period.name}' is no month of '{owner}' that was closed.", code="not_closed")
    return closed_month(found)


@router.operation("POST", _PATH, roles=(Role.ADMIN,), threads=STATEMENTS, status=CREATED)
def close(call: Call[CloseMonth, Nothing]) -> ClosedMonth:
    """Close an owner's month that is over, once: what is less than a minimum is carried over to the next."""
    month, closings = _month(call), Closings(call.services.ledger.corrections)

    def audit(row: Closing) -> None:
        detail = {"owner": row.owner, "period": row.period, "payouts": [one._asdict() for one in row.payouts]}
        if row.left_out:
            detail["left_out"] = list(row.left_out)
        call.store.record([Event(at=call.now, actor=call.principal.key_id, action="statement.closed", detail=detail)])

    with _translated():
        call.services.ledger.corrections.close_until(month.period.end * MICROSECONDS)
        closed = closings.again(month) or closings.close(
            month, _summed(call, month), at=call.now, actor=call.principal.key_id, audit=audit
        )
    return closed_month(closed)


@router.operation("POST", f"{_PATH}/preview", roles=(Role.ADMIN,), threads=STATEMENTS)
def preview(call: Call[CloseMonth, Nothing]) -> ClosedMonth:
    """Show what closing an owner's month would make due and carry over; nothing is closed."""
    month, closings = _month(call), Closings(call.services.ledger.corrections)
    with _translated():
        known = closings.again(month)
        if known is not None:
            return closed_month(known)
        planned = closings.plan(month, _summed(call, month), at=call.now, actor=call.principal.key_id)
    return closed_month(planned, preview=True)


def _month(call: Call[CloseMonth, Nothing]) -> Month:
    """The month to be closed, which is over."""
    period, body = period_of(call), call.body
    if period.kind != "month" or latest(call) < period.end:
        raise _not_over(period)
    return Month(body.owner_id, period, body.by_currency, body.leave_out_deleted)


def _summed(call: Call[CloseMonth, Nothing], month: Month) -> Summed:
    """What the ledger has of a month; for a closing, nothing is dated into it before this is called."""
    ledger, period = call.services.ledger, month.period
    if is_open(call, period):
        raise _not_over(period)
    account = account_of(call, month.owner, period, in_parts=True)
    require_known(call, month.owner, account, read_ownership(call.store, month.owner))
    return Summed(account.totals, first_end(ledger.path), Local(ledger.path).whole_since())


def _not_over(period: Period) -> Invalid:
    return Invalid(
        f"'{period.name}' is no month that is over: close months, in their order, once they have ended.",
        param="period",
        code=INVALID,
    )


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except ClosingRefused as error:
        text = str(error)
        raise Invalid(f"{text[:1].upper()}{text[1:]}.", param="period", code="closing_refused") from error
    except LedgerError as error:
        raise from_ledger(error, param="period") from error
