"""Buckets of time, in pages, as OpenAI's usage and cost endpoints have them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Final, Protocol

from pydantic import Field

from flexgate.server.admin.pages import unknown_cursor
from flexgate.server.http.errors import Invalid

PAGE: Final = "page_"
UnixSeconds = Annotated[int, Field(ge=0, le=10**11)]


class InBuckets(Protocol):
    """A query for buckets."""

    @property
    def start_time(self) -> int: ...
    @property
    def end_time(self) -> int | None: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def page(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Buckets:
    """The buckets of one page, each `width` seconds wide, and the time within them that was asked for."""

    starts: range
    since: int
    until: int
    next_page: str | None


def buckets_of(query: InBuckets, *, width: int, name: str, usual: int, most: int, now: float) -> Buckets:
    """The page that a query asks for.

    Args:
        name: of the width, for messages.
        usual, most: how many buckets a page has by default, and at most.

    Raises:
        Invalid: naming the parameter at fault.
    """
    limit = usual if query.limit is None else query.limit
    if limit > most:
        message = f"'limit' is {limit}. A page has at most {most} buckets of '{name}'."
        raise Invalid(message, param="limit", code="invalid_value")
    end = math.ceil(now) if query.end_time is None else query.end_time
    if end <= query.start_time:
        raise Invalid("'end_time' must be after 'start_time'.", param="end_time", code="invalid_value")
    first = query.start_time // width * width
    start = first if query.page is None else _start(query.page, width)
    if not first <= start < end:
        raise unknown_cursor("page")
    stop = min(start + limit * width, end)
    next_page = f"{PAGE}{stop}" if stop < end else None
    return Buckets(range(start, stop, width), max(start, query.start_time), stop, next_page)


def _start(page: str, width: int) -> int:
    """Where a page begins, by its cursor."""
    number = page.removeprefix(PAGE)
    if number == page or not number.isascii() or not number.isdigit() or len(number) > 11 or int(number) % width:
        raise unknown_cursor("page")
    return int(number)
