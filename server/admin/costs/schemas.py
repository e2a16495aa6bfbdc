"""Costs as OpenAI's clients know them; by model, expert and owner as well."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Final, Literal

from pydantic import Field

from flexgate.policies.agreements import Unit
from flexgate.server.admin.buckets import UnixSeconds
from flexgate.server.http.schemas import Shown, is_none
from flexgate.server.http.validation import Closed
from flexgate.server.ledger.amounts import exact

DAY: Final = 86_400
USUAL, MOST = 7, 180
"""How many buckets a page has by default, and at most."""
CostGroup = Literal["project_id", "api_key_id", "line_item", "model", "expert_id", "owner_id"]
UNITS: Final[dict[Unit, str]] = {
    "request": "requests",
    "thousand_tokens": "1000_tokens",
    "thousand_share_weighted_tokens": "1000_share_weighted_tokens",
    "million_tokens": "1000000_tokens",
    "million_share_weighted_tokens": "1000000_share_weighted_tokens",
}


class ListCosts(Closed):
    """OpenAI's parameters, and `model`, `expert_id` and `owner_id` to group by. Times are Unix seconds."""

    start_time: UnixSeconds
    end_time: UnixSeconds | None = None
    bucket_width: Literal["1d"] = "1d"
    project_ids: Annotated[list[str] | None, Field(max_length=100)] = None
    api_key_ids: Annotated[list[str] | None, Field(max_length=100)] = None
    group_by: Annotated[list[CostGroup] | None, Field(max_length=6)] = None
    limit: Annotated[int | None, Field(ge=1, le=MOST)] = None
    page: str | None = None


class CostAmount(Shown):
    """An amount of money that is not rounded: `exact` is the decimal number, `value` what a double can hold of it."""

    value: float
    currency: str
    exact: str


class CostResult(Shown):
    """What is owed to owners for what one group used in a bucket, by the agreements that the uses count under.

    One for each currency. A line item is one rate of one version of an agreement; only by line items there is a
    quantity.
    """

    object: Literal["organization.costs.result"] = "organization.costs.result"
    amount: CostAmount
    line_item: str | None
    quantity: float | None
    quantity_unit: str | None
    project_id: str | None
    api_key_id: str | None
    user_id: None = None
    api_source: None = None
    model: Annotated[str | None, Field(exclude_if=is_none)] = None
    expert_id: Annotated[str | None, Field(exclude_if=is_none)] = None
    owner_id: Annotated[str | None, Field(exclude_if=is_none)] = None


class CostBucket(Shown):
    """A day in UTC; Unix seconds, the start inside, the end not. Of the first and the last, only what is within the
    query's times counts.
    """

    object: Literal["bucket"] = "bucket"
    start_time: int
    end_time: int
    results: list[CostResult]


class CostPage(Shown):
    """Buckets, the earliest first; `next_page` is the `page` of those that follow.

    `incomplete_before` is there where usage of earlier times, which the query asks for, was deleted.
    """

    object: Literal["page"] = "page"
    data: list[CostBucket]
    has_more: bool
    next_page: str | None
    incomplete_before: Annotated[int | None, Field(exclude_if=is_none)] = None


def amount_of(value: Fraction, currency: str) -> CostAmount:
    """An exact amount."""
    return CostAmount(value=float(value), currency=currency.lower(), exact=exact(value))
