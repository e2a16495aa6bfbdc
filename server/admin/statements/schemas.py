"""Statements at the wire. Tenants are pseudonyms; exact numbers with fractions are decimal strings."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field

from flexgate.policies.ids import OwnerIdField
from flexgate.server.http.schemas import Shown
from flexgate.server.http.validation import Closed
from flexgate.server.ledger.amounts import Uses, exact, written
from flexgate.server.ledger.entries import MICROSECONDS
from flexgate.server.ledger.shares import PPM
from flexgate.server.ledger.statements import Account, Line, Period


class ShowStatement(Closed):
    """An owner's own key may leave `owner_id` out."""

    owner_id: OwnerIdField | None = None
    format: Literal["json", "csv", "html"] = "json"


class Used(Shown):
    """Uses: requests, each once for every expert that took part.

    Attributes:
        tokens: positions, each once for every expert that took part in it.
        share_weighted_tokens: all tokens of each request, times the experts' shares.
    """

    requests: int
    tokens: int
    share_weighted_tokens: str


class StatementLine(Used):
    """What one expert did under one version of an agreement; `amount` is the exact decimal number.

    Without an agreement are uses from before the ledger recorded it. Without an amount, nothing is to be paid.
    """

    expert_id: str
    agreement_id: str | None
    agreement_version: int | None
    currency: str | None
    amount: str | None
    last_used_at: float


class StatementTotal(Shown):
    """The sum of all lines in one currency, rounded once to its smallest unit, half to even."""

    currency: str
    amount: str


class StatementTenant(Used):
    """What one project used, under the owner's name for it."""

    tenant: str


class StatementDay(Used):
    """What was used in one day. `requests` counts each request once."""

    start_time: int


class StatementDenials(Shown):
    """Requests that were denied because of an expert, by the code of the reason, as far as the audit log has them."""

    expert_id: str
    code: str
    requests: int


class StatementChange(Shown):
    """A right that was given or taken away: an agreement, or an expert's weights.

    Attributes:
        effective_at: when it came into force; null where that is not recorded.
        last_used_at: when the last request under it ended, within the period.
    """

    kind: str
    id: str
    version: int | None
    requested_at: float
    effective_at: float | None
    last_used_at: float | None


class Statement(Shown):
    """What an owner's experts did on this server in a day or month in UTC, and what is owed for it.

    A request belongs to the period in which it ended. While a period is `open`, its statement can grow: until it is
    over, and the ledger has written all of it. Uses and amounts are this server's; denials and changes are those of all
    servers that share its policy database.
    """

    object: Literal["statement"] = "statement"
    id: Annotated[str, Field(description="The period: '2026-11' or '2026-11-30'.")]
    owner_id: str
    period: Literal["day", "month"]
    start_time: int
    end_time: int
    made_at: float
    open: bool
    requests: int
    tokens: int
    share_weighted_tokens: str
    totals: list[StatementTotal]
    lines: list[StatementLine]
    tenants: list[StatementTenant]
    days: list[StatementDay]
    denials: list[StatementDenials]
    changes: list[StatementChange]


def statement_of(
    period: Period,
    owner: str,
    account: Account,
    *,
    now: float,
    written_down: bool,
    name_of: Callable[[str], str],
    denials: dict[tuple[str, str], int],
    changes: list[StatementChange],
) -> Statement:
    """A statement made at `now`.

    Args:
        written_down: whether the ledger had written all ends of the period before it was read.
        name_of: gives the owner's name for a project.
    """
    uses = account.uses
    return Statement(
        id=period.name,
        owner_id=owner,
        period=period.kind,
        start_time=period.start,
        end_time=period.end,
        made_at=now,
        open=now < period.end or not written_down,
        requests=account.requests,
        tokens=uses.tokens,
        share_weighted_tokens=_weighted(uses),
        totals=[StatementTotal(currency=c, amount=written(value, c)) for c, value in account.totals.items()],
        lines=[_line(line) for line in account.lines],
        tenants=sorted(
            (StatementTenant(tenant=name_of(tenant), **_used(of_one)) for tenant, of_one in account.tenants.items()),
            key=lambda one: one.tenant,
        ),
        days=[
            StatementDay(start_time=day.start, **{**_used(day.uses), "requests": day.requests}) for day in account.days
        ],
        denials=[
            StatementDenials(expert_id=expert, code=code, requests=requests)
            for (expert, code), requests in sorted(denials.items())
        ],
        changes=changes,
    )


def _line(line: Line) -> StatementLine:
    agreement, version = line.agreement or (None, None)
    value, currency = line.amount or (None, None)
    return StatementLine(
        expert_id=line.expert,
        agreement_id=agreement,
        agreement_version=version,
        **_used(line.uses),
        currency=currency,
        amount=None if value is None else exact(value),
        last_used_at=line.last_used_at / MICROSECONDS,
    )


def _used(uses: Uses) -> dict[str, Any]:
    return {"requests": uses.requests, "tokens": uses.tokens, "share_weighted_tokens": _weighted(uses)}


def _weighted(uses: Uses) -> str:
    return exact(Fraction(uses.share_weighted_ppm, PPM))
