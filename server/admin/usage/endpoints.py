"""`/v1/organization/usage/completions`: what requests to this server have used."""

from __future__ import annotations

import math
from itertools import groupby
from typing import Final

from flexgate.policies.documents import Role
from flexgate.server.admin.operation import Call, Nothing
from flexgate.server.admin.pages import unknown_cursor
from flexgate.server.admin.router import OperationRouter
from flexgate.server.admin.usage.schemas import BUCKETS, SECONDS, ListUsage, UsageBucket, UsagePage, result_of
from flexgate.server.http.errors import Invalid, Unavailable
from flexgate.server.ledger.errors import LedgerError, TooMuchAsked
from flexgate.server.ledger.usage import Sought, Sum, sums
from flexgate.server.policy.executors import USAGE

PAGE: Final = "page_"

router: Final = OperationRouter()


@router.operation("GET", "/v1/organization/usage/completions", roles=(Role.ADMIN, Role.AUDITOR), threads=USAGE)
def completions(call: Call[Nothing, ListUsage]) -> UsagePage:
    """Sum tokens and requests that this server has recorded, per bucket of time, by what `group_by` names."""
    query = call.query
    width, (usual, most) = SECONDS[query.bucket_width], BUCKETS[query.bucket_width]
    limit = usual if query.limit is None else query.limit
    if limit > most:
        message = f"'limit' is {limit}. A page has at most {most} buckets of '{query.bucket_width}'."
        raise Invalid(message, param="limit", code="invalid_value")
    end = math.ceil(call.now) if query.end_time is None else query.end_time
    if end <= query.start_time:
        raise Invalid("'end_time' must be after 'start_time'.", param="end_time", code="invalid_value")
    first = query.start_time // width * width
    start = first if query.page is None else _start(query.page, width)
    if not first <= start < end:
        raise unknown_cursor("page")
    stop = min(start + limit * width, end)
    since = max(start, query.start_time)
    sought = Sought(since, stop, width, query.project_ids, query.api_key_ids, query.models, query.group_by or ())
    try:
        found = {at: list(of_one) for at, of_one in groupby(sums(call.services.ledger.path, sought), _start_of)}
    except TooMuchAsked as error:
        raise Invalid(_sentence(error), param="start_time", code="query_too_large") from error
    except LedgerError as error:
        raise Unavailable(_sentence(error), code="ledger_unavailable") from error
    buckets = [
        UsageBucket(start_time=at, end_time=at + width, results=[result_of(one) for one in found.get(at, ())])
        for at in range(start, stop, width)
    ]
    more = stop < end
    return UsagePage(data=buckets, has_more=more, next_page=f"{PAGE}{stop}" if more else None)


def _sentence(error: LedgerError) -> str:
    return f"{str(error)[:1].upper()}{str(error)[1:]}."


def _start_of(one: Sum) -> int:
    return one.start


def _start(page: str, width: int) -> int:
    """Where a page begins, by its cursor."""
    number = page.removeprefix(PAGE)
    if number == page or not number.isascii() or not number.isdigit() or len(number) > 11 or int(number) % width:
        raise unknown_cursor("page")
    return int(number)
