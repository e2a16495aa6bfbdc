"""Count in budgets what requests used that were running when the server was killed, before it serves again.

The ledger ends them at its next start, and they are owed. Until then, the reservations that the server left count.
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
from flexgate.policies.store.store import Store
from flexgate.server.inference.limits.budget_usage import BudgetUsage
from flexgate.server.inference.limits.limiter import REQUESTS, TOKENS, Limiter, scopes_of
from flexgate.server.inference.request.extension import COUNTERFACTUAL
from flexgate.server.ledger.amounts import Uses, owed
from flexgate.server.ledger.entries import MICROSECONDS, Part
from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.journal import Journal
from flexgate.server.ledger.terms import Terms, Version, duties_of

logger = logging.getLogger(__name__)
Duties = Mapping[Version, tuple[Compensate, ...]]


def count_interrupted(store: Store, ledger: Journal, clock: Callable[[], float]) -> None:
    """Put what they used in the place of what they had reserved; logs where the database does not take it. Blocks."""
    at = 0.0  # of each request, in Unix seconds: when it made its last mark, as in the ledger
    usage = BudgetUsage(store, server=ledger.id, clock=clock)
    limiter, tenants = Limiter(usage, wall_clock=lambda: at), store.snapshot().tenants
    ended = [(one, at, used, used.parts(one)) for one, _, at, used in ledger.interrupted]
    try:
        usage.refresh()
        duties = _duties(store, [part for _, _, _, parts in ended for part in parts])
        for registration, microseconds, used, parts in ended:
            tenant, at = tenants.get(TenantId(registration.tenant)), microseconds / MICROSECONDS
            if tenant is not None:
                tokens = used.prompt_tokens + used.completion_tokens
                counts = tokens > 0 and not registration.endpoint.endswith(f"#{COUNTERFACTUAL}")
                amounts = {REQUESTS: int(counts), TOKENS: tokens}
                limiter.count(scopes_of(tenant, registration.key_id), amounts, _costs(parts, tokens, duties))
        usage.refresh()
    except StoreError as error:
        logger.error("budgets lack what %d interrupted requests used: %s", len(ended), error)


def _duties(store: Store, did: Sequence[Part]) -> Duties:
    """What their agreements let be paid; nothing where the database is not the one that they count under."""
    counted_under = {
        Terms((part.agreement, part.agreement_version), part.duties_sha256)
        for part in did
        if part.agreement is not None and part.agreement_version is not None
    }
    try:
        return duties_of(store, counted_under)
    except LedgerError as error:
        logger.error("budgets lack what interrupted requests cost: %s", error)
        return {}


def _costs(parts: Sequence[Part], tokens: int, duties: Duties) -> dict[str, int]:
    """What a request cost in each currency, in billionths, rounded up."""
    total: defaultdict[str, Fraction] = defaultdict(Fraction)
    for part in parts:
        uses = Uses(1, part.prompt_positions + part.completion_positions, part.share_ppm * tokens)
        found = owed(duties.get((part.agreement or "", part.agreement_version or 0), ()), uses)
        if found is not None:
            total[found[1]] += found[0]
    return {currency: math.ceil(amount * BILLION) for currency, amount in total.items()}
