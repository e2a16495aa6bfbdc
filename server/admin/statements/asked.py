"""The owner and the period that a call asks for, and whether the ledger has all of the period."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any, Final

from flexgate.policies.documents import Role
from flexgate.server.admin.operation import Call
from flexgate.server.http.errors import Invalid
from flexgate.server.http.refusals import not_found
from flexgate.server.ledger.entries import MICROSECONDS
from flexgate.server.ledger.errors import TooMuchAsked
from flexgate.server.ledger.reading import Local
from flexgate.server.ledger.statements import Period

INVALID: Final = "invalid_value"
MOST_SECONDS: Final = 30.0
ROLES: Final = (Role.ADMIN, Role.AUDITOR, Role.OWNER)


def owner_of(call: Call[Any, Any]) -> str:
    """The owner of a key, or the one that another key names; to an owner, no other exists."""
    own, asked = call.principal.owner_id, call.query.owner_id
    if own is None and asked is None:
        raise Invalid("Name the owner in 'owner_id'.", param="owner_id", code=INVALID)
    if own is not None and asked not in (None, own):
        raise not_found()
    return str(asked or own)


def period_of(call: Call[Any, Any]) -> Period:
    """The period in the path, which has begun."""
    period = Period.of(call.path["period"])
    if period is None:
        raise Invalid(
            "The period is a day or a month, such as '2026-11-30' or '2026-11'.", param="period", code=INVALID
        )
    if latest(call) < period.start:
        raise Invalid(f"The period '{period.name}' has not begun.", param="period", code=INVALID)
    return period


def latest(call: Call[Any, Any]) -> float:
    """The time, or the end of the last month that was closed where the clock was set back."""
    return max(call.now, call.services.ledger.corrections.closed / MICROSECONDS)


class Deadline:
    """How long the denials of a statement may be counted."""

    def __init__(self) -> None:
        self._end = time.monotonic() + MOST_SECONDS

    def require(self) -> None:
        """Raise `TooMuchAsked` where it is over."""
        if time.monotonic() > self._end:
            raise TooMuchAsked(f"counting denied requests took longer than {MOST_SECONDS:g} seconds")


def is_open(call: Call[Any, Any], period: Period) -> bool:
    """Whether more may come into a period; to be asked before the ledger is read."""
    ledger = call.services.ledger
    return latest(call) < period.end or not ledger.corrections.settled() or not ledger.has_written(period.end)


def require_whole(call: Call[Any, Any], period: Period) -> None:
    """Refuse a period of which usage was deleted; to be asked after the ledger was read."""
    whole = Local(call.services.ledger.path).whole_since()
    if period.start < whole:
        since = datetime.fromtimestamp(whole, UTC).date()
        message = f"Usage of the period '{period.name}' was deleted (--usage-days): it is whole since {since}."
        raise Invalid(message, param="period", code="usage_deleted")


def advice(period: Period) -> str:
    """What to do where a period has too much to sum."""
    return "ask for its days" if period.kind == "month" else "ask an administrator for its costs"
