"""What is owed to an owner for a period, and whether that month was closed, as the ledger has it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from flexgate.policies.store.ownership import Ownership
from flexgate.server.admin.operation import Call
from flexgate.server.admin.statements.asked import INVALID, advice, require_whole
from flexgate.server.http.errors import Invalid
from flexgate.server.http.refusals import from_ledger
from flexgate.server.ledger.closings import Closing, Closings
from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.statements import Account, Period, owner_uses, owner_uses_in_parts
from flexgate.server.ledger.terms import terms_of

PARTS_SECONDS: Final = 900.0
"""How long a sum may take that is made in parts."""


def account_of(call: Call[Any, Any], owner: str, period: Period, *, in_parts: bool = False) -> Account:
    """What an owner's experts did in a period; `in_parts` where it is over, and may be too much to sum at once."""
    uses = partial(owner_uses_in_parts, goes_on=_goes_on(call)) if in_parts else owner_uses
    try:
        found = uses(call.services.ledger.path, owner, period)
        require_whole(call, period)
        return found.account(terms_of(call.store, found.counted_under))
    except LedgerError as error:
        raise from_ledger(error, param="period", advice=advice(period)) from error


def require_known(call: Call[Any, Any], owner: str, account: Account, ownership: Ownership) -> None:
    """Refuse an operator's call for an owner that neither the policy nor the ledger knows."""
    if call.principal.owner_id is not None or ownership.times or account.lines or account.corrections:
        return
    if not _has_closings(call, owner):
        raise Invalid(f"No expert of this server has the owner '{owner}'.", param="owner_id", code=INVALID)


def closing_of(call: Call[Any, Any], owner: str, period: Period) -> Closing | None:
    """The closing of a month; None of what is no closed month."""
    try:
        return Closings(call.services.ledger.corrections).find(owner, period)
    except LedgerError as error:
        raise from_ledger(error, param="period") from error


def _goes_on(call: Call[Any, Any]) -> Callable[[], bool]:
    end = time.monotonic() + PARTS_SECONDS
    return lambda: time.monotonic() < end and not call.services.draining


def _has_closings(call: Call[Any, Any], owner: str) -> bool:
    try:
        return Closings(call.services.ledger.corrections).has_any(owner)
    except LedgerError as error:
        raise from_ledger(error, param="period") from error
