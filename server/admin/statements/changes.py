"""Rights that an owner gave or took away in a period: agreements, and the weights of its experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from flexgate.policies.agreements import Agreement
from flexgate.policies.audit import CHANGES, Entry
from flexgate.policies.store.agreements import AgreementChange, changes_between
from flexgate.policies.store.audit import Sought, search
from flexgate.policies.store.ownership import Ownership
from flexgate.policies.store.store import Store
from flexgate.server.admin.statements.schemas import StatementChange
from flexgate.server.ledger.entries import MICROSECONDS
from flexgate.server.ledger.errors import TooMuchAsked
from flexgate.server.ledger.statements import DAY, Account, Period

MOST: Final = 10_000
_WEIGHTS: Final = {"weights.added": "expert.added", "weights.revoked": "expert.revoked"}
_CLEARED: Final = "weights.cleared"


def changes_of(
    store: Store, owner: str, ownership: Ownership, period: Period, account: Account
) -> list[StatementChange]:
    """All of them, in the order in which they were requested. Blocks; raises `TooMuchAsked` for too many."""
    agreements, weights = _last_uses(account)
    found = [_of_agreement(one, agreements) for one in changes_between(store, owner, period.start, period.end)]
    found += _of_weights(store, ownership, period, weights)
    return sorted(found, key=lambda one: one.requested_at)


def _last_uses(account: Account) -> tuple[dict[tuple[str, int], float], dict[str, float]]:
    """When each version of an agreement, and each expert, was last used; Unix seconds."""
    agreements: dict[tuple[str, int], float] = {}
    experts: dict[str, float] = {}
    for line in account.lines:
        at = line.last_used_at / MICROSECONDS
        experts[line.expert] = max(experts.get(line.expert, 0.0), at)
        if line.agreement is not None:
            agreements[line.agreement] = max(agreements.get(line.agreement, 0.0), at)
    return agreements, experts


def _of_agreement(change: AgreementChange, last_uses: Mapping[tuple[str, int], float]) -> StatementChange:
    """A new version is in force from its `not_before` on, if that comes later; the one that ended was used last when it
    says.
    """
    ended, made = change.before, change.after
    agreement = made or ended
    assert agreement is not None
    verb = "terminated" if made is None else "created" if ended is None else "revised"
    return StatementChange(
        kind=f"agreement.{verb}",
        id=agreement.id,
        version=agreement.version,
        requested_at=change.at,
        effective_at=None if made is None else max(change.at, made.starts),
        last_used_at=None if ended is None else _last_use(ended, last_uses),
    )


def _last_use(agreement: Agreement, last_uses: Mapping[tuple[str, int], float]) -> float | None:
    return last_uses.get((agreement.id, agreement.version))


def _of_weights(
    store: Store, ownership: Ownership, period: Period, last_uses: Mapping[str, float]
) -> Iterator[StatementChange]:
    def concerns(entry: Entry) -> bool:
        in_time = entry.at < period.end or entry.action == _CLEARED
        expert = _expert(entry.detail)
        return in_time and entry.action in (*_WEIGHTS, _CLEARED) and ownership.had(expert, entry.at, entry.at)

    sought = Sought(since=period.start, until=period.end + DAY, log=CHANGES, matches=concerns)
    entries = search(store.engine, sought, limit=MOST + 1, oldest=True)
    if len(entries) > MOST:
        raise TooMuchAsked(f"weights changed more than {MOST:,} times")
    cleared = {e.detail["weights_epoch"]: e.detail["effective_at"] for e in entries if e.action == _CLEARED}
    for entry in entries:
        if entry.action in _WEIGHTS:
            expert, revoked = _expert(entry.detail), entry.action == "weights.revoked"
            yield StatementChange(
                kind=_WEIGHTS[entry.action],
                id=expert,
                version=None,
                requested_at=entry.at,
                effective_at=cleared.get(entry.detail["weights_epoch"]) if revoked else entry.at,
                last_used_at=last_uses.get(expert) if revoked else None,
            )


def _expert(detail: Mapping[str, Any]) -> str:
    return str(detail.get("expert", detail.get("id")))
