"""The duties that uses count under, from the history of the policy."""

from __future__ import annotations

from collections.abc import Collection

from flexgate.policies.agreements import Agreement, Compensate
from flexgate.policies.store.agreements import read_versions
from flexgate.policies.store.store import Store
from flexgate.server.ledger.errors import LedgerError


def terms_of(store: Store, names: Collection[tuple[str, int]]) -> dict[tuple[str, int], Agreement]:
    """Versions of agreements by id and version, in force or not. Blocks.

    Raises:
        LedgerError: the policy database does not have one of them.
    """
    found = read_versions(store, names)
    if missing := sorted(set(names) - found.keys()):
        id_, version = missing[0]
        raise LedgerError(
            f"uses count under version {version} of agreement '{id_}', which this policy database never had: "
            "restore the database that belongs to the ledger"
        )
    return found


def duties_of(store: Store, names: Collection[tuple[str, int]]) -> dict[tuple[str, int], tuple[Compensate, ...]]:
    """What each version of an agreement lets be paid; raises as `terms_of`."""
    return {
        name: tuple(duty for duty in agreement.duties if isinstance(duty, Compensate))
        for name, agreement in terms_of(store, names).items()
    }
