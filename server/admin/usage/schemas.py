"""Usage as OpenAI's clients know it; by expert and owner as well."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from flexgate.server.admin.buckets import UnixSeconds
from flexgate.server.http.schemas import Shown, is_none
from flexgate.server.http.validation import Closed
from flexgate.server.ledger.usage import Group, Sum

Width = Literal["1m", "1h", "1d"]
SECONDS: Final[dict[Width, int]] = {"1m": 60, "1h": 3600, "1d": 86_400}
BUCKETS: Final[dict[Width, tuple[int, int]]] = {"1m": (60, 1440), "1h": (24, 168), "1d": (7, 31)}
"""Of each width, how many buckets a page has by default, and at most."""


class ListUsage(Closed):
    """OpenAI's parameters, and `expert_id` and `owner_id` to group by. `start_time` and `end_time` are Unix seconds."""

    start_time: UnixSeconds
    end_time: UnixSeconds | None = None
    bucket_width: Width = "1d"
    project_ids: Annotated[list[str] | None, Field(max_length=100)] = None
    api_key_ids: Annotated[list[str] | None, Field(max_length=100)] = None
    models: Annotated[list[str] | None, Field(max_length=100)] = None
    group_by: Annotated[list[Group] | None, Field(max_length=5)] = None
    limit: Annotated[int | None, Field(ge=1, le=1440)] = None
    page: str | None = None


class UsageResult(Shown):
    """What one group used in a bucket.

    By expert, `input_tokens` and `output_tokens` are positions in which it was chosen; by owner they are summed over
    its experts, so that a position may count more than once. Requests count for each that took part, cached tokens for
    none.
    """

    object: Literal["organization.usage.completions.result"] = "organization.usage.completions.result"
    input_tokens: int
    output_tokens: int
    input_cached_tokens: int
    input_audio_tokens: Literal[0] = 0
    output_audio_tokens: Literal[0] = 0
    num_model_requests: int
    project_id: str | None
    user_id: None = None
    api_key_id: str | None
    model: str | None
    batch: None = None
    expert_id: Annotated[str | None, Field(exclude_if=is_none)] = None
    owner_id: Annotated[str | None, Field(exclude_if=is_none)] = None


class UsageBucket(Shown):
    """A period of time: its start is inside, its end is not. Unix seconds, whole widths since 1970 in UTC.

    Of the first and the last, only what is within the query's times counts.
    """

    object: Literal["bucket"] = "bucket"
    start_time: int
    end_time: int
    results: list[UsageResult]


class UsagePage(Shown):
    """Buckets, the earliest first; `next_page` is the `page` of those that follow.

    `incomplete_before` is there where usage of earlier times, which the query asks for, was deleted.
    """

    object: Literal["page"] = "page"
    data: list[UsageBucket]
    has_more: bool
    next_page: str | None
    incomplete_before: Annotated[int | None, Field(exclude_if=is_none)] = None


def result_of(one: Sum) -> UsageResult:
    """One sum."""
    names = {group: one.group.get(group) for group in ("project_id", "api_key_id", "model", "expert_id", "owner_id")}
    return UsageResult.model_validate(
        {
            "input_tokens": one.prompt_tokens,
            "output_tokens": one.completion_tokens,
            "input_cached_tokens": one.cached_tokens,
            "num_model_requests": one.requests,
            **names,
        }
    )
