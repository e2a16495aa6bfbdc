"""The duties that uses count under, from the history of the policy."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from flexgate.policies.agreements import Agreement, Compensate, duties_sha256
from flexgate.policies.store.agreements import read_versions
from flexgate.policies.store.store import Store
from flexgate.server.ledger.errors import LedgerError

Version = tuple[str, int]
"""Of an agreement: its id and number."""


class Terms(NamedTuple):
    """A version of an agreement with a digest of its duties, None of uses that were recorded without one."""

    version: Version
    duties_sha256: str | None


def terms_of(store: Store, counted_under: Collection[Terms]) -> dict[Version, Agreement]:
    """Versions of agreements, in force or not. Blocks.

    Raises:
        LedgerError: the policy database does not have one of them, or has another one under its number.
    """
    found = read_versions(store, {terms.version for terms in counted_under})
    for (id_, number), digest in sorted(counted_under, key=lambda terms: terms.version):
        agreement = found.get((id_, number))
        if agreement is None or digest not in (None, duties_sha256(agreement.duties)):
            has = "never had" if agreement is None else "has with other duties"
            raise LedgerError(
                f"uses count under version {number} of agreement '{id_}', which this policy database {has}: "
                "restore the database that belongs to the ledger"
            )
    return found


def duties_of(store: Store, counted_under: Collection[Terms]) -> dict[Version, tuple[Compensate, ...]]:
    """What each version of an agreement lets be paid; raises as `terms_of`."""
    return {
        version: tuple(duty for duty in agreement.duties if isinstance(duty, Compensate))
        for version, agreement in terms_of(store, counted_under).items()
    }
