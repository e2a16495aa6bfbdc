"""What owners and administrators do with agreements.

`owner_id` of None is an administrator. An owner sees and changes its own agreements; another
owner's is as unknown as one that does not exist.
"""

from __future__ import annotations

from flexgate.policies.errors import ChangeRefused, ObjectUnknown
from flexgate.policies.store.documents import read_all
from flexgate.policies.store.engine import reading
from flexgate.policies.store.store import Store
from flexgate.policies.terms import Agreement


def list_agreements(store: Store, *, owner_id: str | None = None) -> list[Agreement]:
    """The agreements in the order in which they were first made."""
    with reading(store.engine) as connection:
        agreements = read_all(connection, Agreement)
    return [a for a in agreements if owner_id is None or a.owner == owner_id]


def get_agreement(store: Store, agreement_id: str, *, owner_id: str | None = None) -> Agreement:
    """One agreement; raises `ObjectUnknown`."""
    for agreement in list_agreements(store, owner_id=owner_id):
        if agreement.id == agreement_id:
            return agreement
    raise _unknown(agreement_id)


def put_agreement(store: Store, agreement: Agreement, *, actor: str, at: float, owner_id: str | None = None) -> int:
    """Make an agreement, or change its terms under a higher version; returns the policy version."""
    if owner_id is not None and agreement.owner != owner_id:
        raise ChangeRefused("an owner makes agreements in its own name only")
    with store.change(actor=actor, note="put agreement", at=at) as change:
        before = change.get(Agreement, agreement.id)
        if before is not None and before.owner != agreement.owner:
            raise ChangeRefused(f"the id {agreement.id!r} is taken: choose another one")
        change.put(agreement)
    return change.policy_version


def withdraw_agreement(store: Store, agreement_id: str, *, actor: str, at: float, owner_id: str | None = None) -> int:
    """End an agreement now; returns the policy version. An owner may always do this."""
    with store.change(actor=actor, note="withdraw agreement", at=at) as change:
        agreement = change.get(Agreement, agreement_id)
        if agreement is None or owner_id not in (None, agreement.owner):
            raise _unknown(agreement_id)
        change.remove(Agreement, agreement_id)
    return change.policy_version


def _unknown(agreement_id: str) -> ObjectUnknown:
    return ObjectUnknown(f"there is no agreement {agreement_id!r}")
