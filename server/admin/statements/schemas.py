"""Statements at the wire. Tenants are pseudonyms; exact numbers with fractions are decimal strings."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from flexgate.policies.documents import Cost
from flexgate.policies.ids import OwnerIdField
from flexgate.server.admin.receipts.schemas import Receipt
from flexgate.server.http.schemas import Shown
from flexgate.server.http.validation import Closed
from flexgate.server.ledger.amounts import Uses, exact, written
from flexgate.server.ledger.closings import Closing
from flexgate.server.ledger.corrections import Correction
from flexgate.server.ledger.entries import MICROSECONDS
from flexgate.server.ledger.shares import PPM
from flexgate.server.ledger.statements import Account, Line, Period


class OfOwner(Closed):
    """An owner's own key may leave `owner_id` out."""

    owner_id: OwnerIdField | None = None


class ShowStatement(OfOwner):
    """In which form."""

    format: Literal["json", "csv", "html"] = "json"


class ListStatementReceipts(OfOwner):
    """Receipts after the one of a number."""

    after: int = Field(0, ge=0, le=2**62)
    limit: int = Field(100, ge=1, le=200)


class ProveReceipt(OfOwner):
    """`last` of the provisional statement that the path is for; without it, all receipts that are made by now count."""

    last: int | None = Field(None, ge=0, le=2**62)


class ListedPeriod(Shown):
    """A month in UTC, and whether its statement is provisional since requests may still end in it."""

    object: Literal["statement.period"] = "statement.period"
    id: str
    start_time: int
    end_time: int
    open: bool


class CloseMonth(Closed):
    """The owner, and the least that is paid in a currency; in others, any amount is."""

    owner_id: OwnerIdField
    minimums: Annotated[list[Cost], Field(max_length=100, fail_fast=True, default_factory=list)]
    leave_out_deleted: Annotated[
        bool, Field(description="Leave out months before it whose usage was deleted before they were closed.")
    ] = False

    @field_validator("minimums")
    @classmethod
    def _once(cls, minimums: list[Cost]) -> list[Cost]:
        if len({one.currency for one in minimums}) != len(minimums):
            raise ValueError("a currency is there twice: give one minimum of each")
        return minimums

    @property
    def by_currency(self) -> dict[str, Fraction]:
        """The minimum of each currency."""
        return {one.currency: Fraction(one.amount) for one in self.minimums}


class PeriodList(Shown):
    """Months, the newest first."""

    object: Literal["list"] = "list"
    data: list[ListedPeriod]


class SignedStatement(Shown):
    """`signature` is of the canonical form of `statement`, whose members docs/receipts.md describes."""

    signature: str
    statement: dict[str, Any]


class OwnersSums(Shown):
    """`signature` is of the canonical form of `owners`, whose members docs/receipts.md describes."""

    owners: dict[str, Any]
    signature: str


class StatementReceiptPage(Shown):
    """Receipts in the order of their numbers."""

    object: Literal["list"] = "list"
    data: list[Receipt]
    has_more: bool


class StatementProof(Shown):
    """The path that leads from a receipt, at `index` of `receipts`, to the root of a signed statement."""

    format: str
    index: str
    number: str
    owner: str
    path: list[str]
    period: str
    receipt: str
    receipts: str
    root: str
    server: str


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
    """The sum of all lines and corrections in one currency, rounded once to its smallest unit, half to even."""

    currency: str
    amount: str


class StatementCorrection(Shown):
    """An amount that was added to what is owed, or taken off, in the period; its receipt may be of an earlier one."""

    correction_id: str
    receipt_id: str
    reason: str
    dispute_id: str | None
    made_at: float
    amount: str
    currency: str


class StatementPayout(Shown):
    """What is due of one currency of a closed month.

    `carried` is from earlier months, `due` the sum of it and the month's `total` where that is at least `minimum`;
    `carried_on` is the rest, which the next month begins with.
    """

    currency: str
    carried: str
    total: str
    minimum: str
    due: str
    carried_on: str


class ClosedMonth(Shown):
    """A month that was closed, once and for good; or what would be closed."""

    object: Literal["statement.closing"] = "statement.closing"
    id: Annotated[str, Field(description="The month: '2026-11'.")]
    owner_id: str
    closed_at: Annotated[float | None, Field(description="Null of a preview, which closes nothing.")]
    payouts: list[StatementPayout]
    left_out: Annotated[
        list[str], Field(description="Months before it that were not closed, since their usage had been deleted.")
    ]


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
    corrections: list[StatementCorrection]
    closing: Annotated[ClosedMonth | None, Field(description="What is due; null of what is not a closed month.")]
    tenants: list[StatementTenant]
    days: list[StatementDay]
    denials: list[StatementDenials]
    changes: list[StatementChange]


def shown_period(period: Period, *, is_open: bool) -> ListedPeriod:
    """A period in a list."""
    return ListedPeriod(id=period.name, start_time=period.start, end_time=period.end, open=is_open)


def statement_of(
    period: Period,
    owner: str,
    account: Account,
    *,
    now: float,
    is_open: bool,
    name_of: Callable[[str], str],
    denials: dict[tuple[str, str], int],
    changes: list[StatementChange],
    closing: Closing | None,
) -> Statement:
    """A statement made at `now`.

    Args:
        is_open: whether requests may still end in the period, or be written.
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
        open=is_open,
        requests=account.requests,
        tokens=uses.tokens,
        share_weighted_tokens=_weighted(uses),
        totals=[StatementTotal(currency=c, amount=written(value, c)) for c, value in account.totals.items()],
        lines=[_line(line) for line in account.lines],
        corrections=[_correction(one) for one in account.corrections],
        closing=None if closing is None else closed_month(closing),
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


def closed_month(closing: Closing, *, preview: bool = False) -> ClosedMonth:
    """A closed month, or one that would be closed."""
    return ClosedMonth(
        id=closing.period,
        owner_id=closing.owner,
        closed_at=None if preview else closing.at / MICROSECONDS,
        left_out=list(closing.left_out),
        payouts=[StatementPayout(**one._asdict()) for one in closing.payouts],
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


def _correction(one: Correction) -> StatementCorrection:
    assert one.amount is not None
    assert one.currency is not None
    return StatementCorrection(
        correction_id=one.id,
        receipt_id=one.request,
        reason=one.reason,
        dispute_id=one.dispute,
        made_at=one.at / MICROSECONDS,
        amount=one.amount,
        currency=one.currency,
    )


def _used(uses: Uses) -> dict[str, Any]:
    return {"requests": uses.requests, "tokens": uses.tokens, "share_weighted_tokens": _weighted(uses)}


def _weighted(uses: Uses) -> str:
    return exact(Fraction(uses.share_weighted_ppm, PPM))
