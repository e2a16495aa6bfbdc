"""What administrators do with sets of experts."""

from __future__ import annotations

from collections.abc import Iterable

from flexgate.policies.documents import ExpertSet
from flexgate.policies.errors import ChangeRefused, ObjectUnknown
from flexgate.policies.store.change import Change
from flexgate.policies.store.database import reading
from flexgate.policies.store.documents import checked, read_all, read_one
from flexgate.policies.store.store import Store


def list_sets(store: Store) -> list[ExpertSet]:
    """The sets in the order in which they were first made."""
    with reading(store.engine) as connection:
        return read_all(connection, ExpertSet)


def get_set(store: Store, set_id: str) -> ExpertSet:
    """One set; raises `ObjectUnknown`."""
    with reading(store.engine) as connection:
        found = read_one(connection, ExpertSet, set_id)
    if found is None:
        raise _unknown(set_id)
    return found


def create_set(store: Store, set_id: str, experts: Iterable[str], *, actor: str, at: float) -> ExpertSet:
    """A new set; raises `ChangeRefused` if its id is taken, or it names what does not exist."""
    created = checked(ExpertSet, {"id": set_id, "experts": list(experts)})
    with store.change(actor=actor, note="create set", at=at) as change:
        if change.get(ExpertSet, set_id) is not None:
            raise ChangeRefused(f"there is a set {set_id!r} already: change it, or choose another id")
        change.put(created)
    return created


def change_set(store: Store, set_id: str, experts: Iterable[str], *, actor: str, at: float) -> ExpertSet:
    """Replace the experts of a set, and so of all agreements, projects and requests that name it."""
    with store.change(actor=actor, note="change set", at=at, urgent=True) as change:
        _require(change, set_id)
        changed = checked(ExpertSet, {"id": set_id, "experts": list(experts)})
        change.put(changed)
    return changed


def delete_set(store: Store, set_id: str, *, actor: str, at: float) -> None:
    """Delete a set that nothing names any more; raises `ChangeRefused` otherwise."""
    with store.change(actor=actor, note="delete set", at=at) as change:
        _require(change, set_id)
        change.remove(ExpertSet, set_id)


def _require(change: Change, set_id: str) -> None:
    if change.get(ExpertSet, set_id) is None:
        raise _unknown(set_id)


def _unknown(set_id: str) -> ObjectUnknown:
    return ObjectUnknown(f"there is no set {set_id!r}")
