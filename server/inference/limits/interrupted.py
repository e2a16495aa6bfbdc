"""Count in budgets what requests used that were running when the server was killed, before it serves again.

The ledger ends them at its next start, and they are owed. Until then, the reservations that the server left count.
The database has up to which sequence of the ledger they are counted, written together with them: so each counts
once, also where a start fails or is killed after the ledger has ended them.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from flexgate.policies.agreements import Compensate
from flexgate.policies.documents import BILLION
from flexgate.policies.errors import StoreError
from flexgate.policies.ids import TenantId
from flexgate.policies.store import budgets
from flexgate.policies.store.budgets import NOTHING_RESERVED, Batch, Reservations
from flexgate.policies.store.store import Store
from flexgate.server.inference.limits.budget_usage import BudgetUsage
from flexgate.server.inference.limits.limiter import REQUESTS, TOKENS, Limiter, scopes_of
from flexgate.server.inference.request.extension import COUNTERFACTUAL
from flexgate.server.ledger.amounts import Uses, owed
from flexgate.server.ledger.entries import MICROSECONDS
from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.interruptions import Interruption, Took, interruptions
from flexgate.server.ledger.journal import Journal
from flexgate.server.ledger.terms import Version, duties_of

logger = logging.getLogger(__name__)
Duties = Mapping[Version, tuple[Compensate, ...]]


def count_interrupted(store: Store, ledger: Journal, clock: Callable[[], float], *, serving: bool = False) -> bool:
    """Put what they used in the place of what they had reserved. Blocks.

    Args:
        serving: what the server has reserved is of requests that run now, and stays.

    Returns:
        Whether the database has it; else it is logged, and to be tried again.
    """
    batch = Batch(budgets.interruptions_writer(ledger.id), ledger.ended_at_start)
    try:
        counted = budgets.last_batch(store.engine, batch.writer)
        after = ledger.ended_before if counted is None else counted
        used = _used(store, interruptions(ledger.path, after, batch.number))
        own = () if serving else budgets.read_use(store.engine, ledger.id).own
        reserved = Reservations(ledger.id, dict.fromkeys(own, 0)) if own else NOTHING_RESERVED
        budgets.add_use(store.engine, used, batch, clock(), reserved)
    except (StoreError, LedgerError) as error:
        logger.error("budgets lack what interrupted requests used, until the database takes it: %s", error)
        return False
    return True


def _used(store: Store, ended: Sequence[Interruption]) -> dict[str, int]:
    """What they used, by what it is counted under, in the budgets that projects and keys have now."""
    at = 0.0  # of each request, in Unix seconds: when it made its last mark, as in the ledger
    usage = BudgetUsage(store)
    limiter, tenants = Limiter(usage, wall_clock=lambda: at), store.snapshot().tenants
    duties = _duties(store, [part for one in ended for part in one.took])
    for one in ended:
        tenant, at = tenants.get(TenantId(one.tenant)), one.ended_at / MICROSECONDS
        if tenant is not None:
            counts = one.tokens > 0 and not one.endpoint.endswith(f"#{COUNTERFACTUAL}")
            amounts = {REQUESTS: int(counts), TOKENS: one.tokens}
            limiter.count(scopes_of(tenant, one.key_id), amounts, _costs(one.took, one.tokens, duties))
    return usage.unwritten()


def _duties(store: Store, took: Sequence[Took]) -> Duties:
    """What their agreements let be paid; nothing where the database is not the one that they count under."""
    try:
        return duties_of(store, {part.terms for part in took if part.terms is not None})
    except LedgerError as error:
        logger.error("budgets lack what interrupted requests cost: %s", error)
        return {}


def _costs(took: Sequence[Took], tokens: int, duties: Duties) -> dict[str, int]:
    """What a request cost in each currency, in billionths, rounded up."""
    total: defaultdict[str, Fraction] = defaultdict(Fraction)
    for part in took:
        found = owed(duties.get(part.version, ()), Uses(1, part.positions, part.share_ppm * tokens))
        if found is not None:
            total[found[1]] += found[0]
    return {currency: math.ceil(amount * BILLION) for currency, amount in total.items()}
