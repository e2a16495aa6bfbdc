"""`/v1/organization/usage/completions`: what requests to this server have used."""

from __future__ import annotations

from itertools import groupby
from operator import attrgetter
from typing import Final

from flexgate.policies.documents import Role
from flexgate.server.admin.buckets import buckets_of
from flexgate.server.admin.operation import Call, Nothing
from flexgate.server.admin.router import OperationRouter
from flexgate.server.admin.usage.schemas import BUCKETS, SECONDS, ListUsage, UsageBucket, UsagePage, result_of
from flexgate.server.http.refusals import from_ledger
from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.usage import Sought, sums
from flexgate.server.policy.executors import USAGE

router: Final = OperationRouter()


@router.operation("GET", "/v1/organization/usage/completions", roles=(Role.ADMIN, Role.AUDITOR), threads=USAGE)
def completions(call: Call[Nothing, ListUsage]) -> UsagePage:
    """Sum tokens and requests per bucket of time, by what `group_by` names; of all servers that share PostgreSQL."""
    query = call.query
    width, (usual, most) = SECONDS[query.bucket_width], BUCKETS[query.bucket_width]
    page = buckets_of(query, width=width, name=query.bucket_width, usual=usual, most=most, now=call.now)
    names = query.project_ids, query.api_key_ids, query.models
    sought = Sought(page.since, page.until, width, *names, query.group_by or ())
    try:
        found = sums(call.services.usage, sought)
        whole = call.services.usage.whole_since()
    except LedgerError as error:
        raise from_ledger(error) from error
    by_start = {at: list(map(result_of, of_one)) for at, of_one in groupby(found, attrgetter("start"))}
    buckets = [UsageBucket(start_time=at, end_time=at + width, results=by_start.get(at, [])) for at in page.starts]
    return UsagePage(
        data=buckets,
        has_more=page.next_page is not None,
        next_page=page.next_page,
        incomplete_before=whole if page.since < whole else None,
    )
