"""Limits as OpenAI's `rate_limits`: one object for the project, and one for each of its keys."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field

from flexgate.policies.documents import Cost, Quota
from flexgate.server.admin.operation import Page
from flexgate.server.admin.pages import Identified, PageOf
from flexgate.server.http.schemas import Shown
from flexgate.server.http.validation import Closed

Amount = Annotated[int, Field(ge=0, le=10**15)] | None
PREFIX: Final = "rl-"
PROJECT: Final = f"{PREFIX}project"
UNLIMITED: Final = 10**15

_FIELDS: Final = {
    "max_requests_per_1_minute": "requests_per_minute",
    "max_tokens_per_1_minute": "tokens_per_minute",
    "max_concurrent_requests": "concurrent_requests",
    "max_tokens_per_1_day": "tokens_per_day",
    "max_tokens_per_1_month": "tokens_per_month",
    "max_requests_per_1_day": "requests_per_day",
    "max_requests_per_1_month": "requests_per_month",
    "max_cost_per_1_day": "cost_per_day",
    "max_cost_per_1_month": "cost_per_month",
    "max_total_tokens": "total_tokens",
}


class UpdateRateLimit(Closed):
    """Null removes a limit; omitted limits stay as they are."""

    max_requests_per_1_minute: Amount = None
    max_tokens_per_1_minute: Amount = None
    max_concurrent_requests: Amount = None
    max_tokens_per_1_day: Amount = None
    max_tokens_per_1_month: Amount = None
    max_requests_per_1_day: Amount = None
    max_requests_per_1_month: Amount = None
    max_cost_per_1_day: Cost | None = None
    max_cost_per_1_month: Cost | None = None
    max_total_tokens: Amount = None

    def fields(self) -> dict[str, Any]:
        """The quota's fields that change."""
        return {_FIELDS[name]: value for name, value in self.model_dump(exclude_unset=True).items()}


class ListRateLimits(Page):
    """OpenAI's default is a hundred."""

    limit: int = Field(100, ge=1, le=100)


class CostObject(Shown):
    """A budget of money; the amount is a decimal number."""

    amount: str
    currency: str


class RateLimitObject(Identified):
    """The limits of a project or of one of its keys. OpenAI's two are very large numbers where there is no limit."""

    object: Literal["project.rate_limit"] = "project.rate_limit"
    model: str
    max_requests_per_1_minute: int
    max_tokens_per_1_minute: int
    max_concurrent_requests: int | None
    max_tokens_per_1_day: int | None
    max_tokens_per_1_month: int | None
    max_requests_per_1_day: int | None
    max_requests_per_1_month: int | None
    max_cost_per_1_day: CostObject | None
    max_cost_per_1_month: CostObject | None
    max_total_tokens: int | None


class RateLimitPage(PageOf[RateLimitObject]):
    """A part of the list of a project's limits, and those of its keys."""


def rate_limit_object(id_: str, quota: Quota, model: str) -> RateLimitObject:
    """A quota as its rate limit."""
    return RateLimitObject(
        id=id_,
        model=model,
        max_requests_per_1_minute=_or_unlimited(quota.requests_per_minute),
        max_tokens_per_1_minute=_or_unlimited(quota.tokens_per_minute),
        max_concurrent_requests=quota.concurrent_requests,
        max_tokens_per_1_day=quota.tokens_per_day,
        max_tokens_per_1_month=quota.tokens_per_month,
        max_requests_per_1_day=quota.requests_per_day,
        max_requests_per_1_month=quota.requests_per_month,
        max_cost_per_1_day=_cost(quota.cost_per_day),
        max_cost_per_1_month=_cost(quota.cost_per_month),
        max_total_tokens=quota.total_tokens,
    )


def _cost(limit: Cost | None) -> CostObject | None:
    return None if limit is None else CostObject(amount=f"{limit.amount:f}", currency=limit.currency)


def _or_unlimited(limit: int | None) -> int:
    return UNLIMITED if limit is None else limit
