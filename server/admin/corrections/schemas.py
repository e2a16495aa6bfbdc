"""Corrections and disputes at the wire."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from flexgate.policies.ids import OwnerIdField
from flexgate.server.http.schemas import Shown
from flexgate.server.http.validation import Closed
from flexgate.server.ledger import corrections
from flexgate.server.ledger.corrections import Kind, State
from flexgate.server.ledger.entries import MICROSECONDS

_Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,80}$")]


class ListCorrections(Closed):
    """Rows after the one of a number, of an owner or of all."""

    owner_id: OwnerIdField | None = None
    after: int = Field(0, ge=0, le=2**62)
    limit: int = Field(100, ge=1, le=200)


class AddCorrection(Closed):
    """A correction or rejection by an administrator, or a dispute by an owner, whose key may leave `owner_id` out.

    The same again with the same `id` adds nothing; a correction must have one. Ids are of one owner and
    kind. `amount` is a decimal number, negative where it is taken off.
    """

    kind: Kind
    receipt_id: _Id
    reason: Annotated[str, Field(min_length=1, max_length=500, pattern=r"^[^\r\n]+$")]
    id: _Id | None = None
    owner_id: OwnerIdField | None = None
    amount: str | None = None
    currency: str | None = None
    dispute_id: _Id | None = None


class Correction(Shown):
    """A row, which is never changed. `state` is a dispute's; `dispute_id` names the one that a row decides."""

    object: Literal["correction"] = "correction"
    id: str
    number: int
    kind: Kind
    owner_id: str
    receipt_id: str
    made_at: float
    reason: str
    amount: str | None
    currency: str | None
    dispute_id: str | None
    state: State | None


class CorrectionPage(Shown):
    """Rows in the order in which they were added."""

    object: Literal["list"] = "list"
    data: list[Correction]
    has_more: bool


def shown(row: corrections.Correction) -> Correction:
    """One row."""
    return Correction(
        id=row.id,
        number=row.number,
        kind=row.kind,
        owner_id=row.owner,
        receipt_id=row.request,
        made_at=row.at / MICROSECONDS,
        reason=row.reason,
        amount=row.amount,
        currency=row.currency,
        dispute_id=row.dispute,
        state=row.state,
    )
