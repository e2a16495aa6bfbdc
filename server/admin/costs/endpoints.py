"""`/v1/organization/costs`: what is owed to owners for what requests to this server have used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Final, NamedTuple

from flexgate.policies.agreements import Compensate
from flexgate.policies.documents import Role
from flexgate.server.admin.buckets import buckets_of
from flexgate.server.admin.costs.schemas import (
    DAY,
    MOST,
    UNITS,
    USUAL,
    CostBucket,
    CostGroup,
    CostPage,
    CostResult,
    ListCosts,
    amount_of,
)
from flexgate.server.admin.operation import Call, Nothing
from flexgate.server.admin.router import OperationRouter
from flexgate.server.http.refusals import from_ledger
from flexgate.server.ledger.amounts import amount, quantity
from flexgate.server.ledger.costs import AgreementUses, uses_by_agreement
from flexgate.server.ledger.errors import LedgerError, TooMuchAsked
from flexgate.server.ledger.terms import duties_of
from flexgate.server.ledger.usage import MOST_SUMS, Sought
from flexgate.server.policy.executors import STATEMENTS

router: Final = OperationRouter()


class _Cost(NamedTuple):
    """One use's place among the results."""

    start: int
    group: tuple[tuple[CostGroup, str | None], ...]
    unit: str | None
    currency: str


@router.operation("GET", "/v1/organization/costs", roles=(Role.ADMIN, Role.AUDITOR), threads=STATEMENTS)
def costs(call: Call[Nothing, ListCosts]) -> CostPage:
    """Sum what is owed to owners under their agreements, per day in UTC, by what `group_by` names."""
    query, groups = call.query, tuple(call.query.group_by or ())
    page = buckets_of(query, width=DAY, name=query.bucket_width, usual=USUAL, most=MOST, now=call.now)
    grouped = tuple(group for group in groups if group != "line_item")
    sought = Sought(page.since, page.until, DAY, query.project_ids, query.api_key_ids, None, grouped)
    try:
        found = uses_by_agreement(call.services.usage, sought)
        whole = call.services.usage.whole_since()
        duties = duties_of(call.store, {one.terms for one in found})
        summed = _summed(_costs(found, duties, by_line="line_item" in groups))
        if len(summed) > MOST_SUMS:
            raise TooMuchAsked(f"there are more than {MOST_SUMS:,} sums")
    except LedgerError as error:
        raise from_ledger(error) from error
    results: dict[int, list[CostResult]] = {}
    for cost, (value, count) in summed.items():
        results.setdefault(cost.start, []).append(_result(cost, value, count))
    buckets = [CostBucket(start_time=at, end_time=at + DAY, results=results.get(at, [])) for at in page.starts]
    return CostPage(
        data=buckets,
        has_more=page.next_page is not None,
        next_page=page.next_page,
        incomplete_before=whole if page.since < whole else None,
    )


def _costs(
    found: Iterable[AgreementUses], duties: Mapping[tuple[str, int], tuple[Compensate, ...]], *, by_line: bool
) -> Iterator[tuple[_Cost, Fraction, Fraction]]:
    """What each duty makes of the uses, with their number of its units."""
    for one in found:
        group: list[tuple[CostGroup, str | None]] = list(one.group.items())
        agreement, version = one.terms.version
        for duty in duties[agreement, version]:
            line: list[tuple[CostGroup, str | None]] = []
            if by_line:
                line = [("line_item", f"{agreement}@{version}, {duty.unit}")]
            cost = _Cost(one.start, (*group, *line), UNITS[duty.unit] if by_line else None, duty.currency)
            yield cost, amount(duty, one.uses), quantity(duty.unit, one.uses)


def _summed(costs: Iterable[tuple[_Cost, Fraction, Fraction]]) -> dict[_Cost, tuple[Fraction, Fraction]]:
    sums: dict[_Cost, tuple[Fraction, Fraction]] = {}
    for cost, value, count in costs:
        before, counted = sums.get(cost, (Fraction(), Fraction()))
        sums[cost] = before + value, counted + count
    return sums


def _result(cost: _Cost, value: Fraction, count: Fraction) -> CostResult:
    names = dict.fromkeys(("project_id", "api_key_id", "line_item"), None) | dict(cost.group)
    return CostResult.model_validate(
        {
            "amount": amount_of(value, cost.currency),
            "quantity": None if cost.unit is None else float(count),
            "quantity_unit": cost.unit,
            **names,
        }
    )
