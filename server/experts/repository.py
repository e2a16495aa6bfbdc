"""What the policy store knows of loaded experts, and the two transactions that change it."""

from __future__ import annotations

from dataclasses import dataclass

from flexgate.experts.manifest import Manifest
from flexgate.policies.store.change import Change
from flexgate.policies.store.store import Store
from flexgate.policies.tenants import Expert
from flexgate.server.experts.errors import ChangeConflict

MAX_DOMAIN = 200


@dataclass(frozen=True, slots=True)
class Added:
    """A package that is loaded: in which slot, and where its private copy is."""

    expert: str
    version: int
    slot: int
    generation: int
    package: str
    weights_digest: str
    base_digest: str


class ResidencyRepository:
    """Blocking; every method is one transaction."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def epoch(self) -> int:
        """The newest weights epoch."""
        return self._store.weights().epoch

    def withdrawn(self) -> frozenset[str]:
        """Experts that must not be resident."""
        return self._store.weights().withdrawn

    def added(self) -> tuple[Added, ...]:
        """Experts that came from packages, in the order in which they came."""
        return tuple(
            Added(
                change.expert,
                change.detail["version"],
                change.slot,
                change.epoch,
                change.package or "",
                change.detail["weights_digest"],
                change.detail["base_digest"],
            )
            for change in self._store.weights().added
        )

    def owner(self, expert: str) -> str | None:
        """The owner that the catalogue names."""
        known = self._store.snapshot().experts
        found = next((entry for entry in known.values() if entry.id == expert), None)
        return None if found is None else found.owner

    def add(self, manifest: Manifest, added: Added, *, actor: str, at: float) -> None:
        """Commit that an expert is resident: dark, until some agreement permits it.

        Raises:
            ChangeConflict: its owner is not the catalogue's, or another process was faster.
        """
        note = f"add expert {added.expert} version {added.version}"
        with self._store.change(actor=actor, note=note, at=at) as change:
            _put(change, manifest)
            detail = {
                "version": added.version,
                "weights_digest": added.weights_digest,
                "base_digest": added.base_digest,
            }
            epoch = change.add_weights(added.expert, slot=added.slot, package=added.package, detail=detail)
            if epoch != added.generation:
                raise ChangeConflict(
                    "Another process changed the experts of this store at the same time. Try again.",
                    code="experts_changing",
                )

    def revoke(self, expert: str, slot: int, *, actor: str, at: float) -> int:
        """Commit that an expert must not be resident; returns the weights epoch."""
        with self._store.change(actor=actor, note=f"revoke expert {expert}", at=at) as change:
            known = change.get(Expert, expert)
            if known is not None:
                change.put(known.model_copy(update={"live": False}))
            return change.revoke_weights(expert, slot=slot, detail={})


def _put(change: Change, manifest: Manifest) -> None:
    known = change.get(Expert, manifest.id)
    if known is not None and known.owner != manifest.owner:
        raise ChangeConflict(
            f"Expert '{manifest.id}' belongs to another owner. A package of '{manifest.owner}' needs an id of its own.",
            code="expert_of_another_owner",
        )
    visibility = "listed" if known is None else known.visibility
    domain = manifest.domain[:MAX_DOMAIN]
    change.put(Expert(id=manifest.id, owner=manifest.owner, domain=domain, live=True, visibility=visibility))
