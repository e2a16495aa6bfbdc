"""Loaded experts in the policy store, and the two transactions that change them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pydantic import BaseModel, ValidationError

from flexgate.experts.package.manifest import Manifest
from flexgate.policies.documents import Expert, Grade, weakest
from flexgate.policies.ids import PUBLIC, ExpertId
from flexgate.policies.store.change import Change
from flexgate.policies.store.documents import damaged
from flexgate.policies.store.store import Store
from flexgate.policies.store.weights_log import WeightsChange
from flexgate.server.experts.errors import ChangeConflict

MAX_DOMAIN: Final = 200
UNRECORDED: Final = -1
"""`Added.merged` of a package whose row was written before that was recorded."""


@dataclass(frozen=True, slots=True)
class Added:
    """A package that is loaded: in which slot, and where its private copy is.

    `merged` is the version of the same expert that the checkpoint held then: 0 where it did not say, None where it
    held none, `UNRECORDED` where that is unknown.
    """

    expert: str
    version: int
    slot: int
    slot_epoch: int
    package: str
    weights_digest: str
    base_digest: str
    merged: int | None = None
    rank: int | None = None
    """Of the expert; None for one with an FFN of its own."""


class _Detail(BaseModel):
    """What the store keeps of a package that was added."""

    version: int
    weights_digest: str
    base_digest: str
    merged_version: int | None = UNRECORDED
    rank: int | None = None


class WeightsRepository:
    """Blocking; every method is one transaction."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def epoch(self) -> int:
        """The newest weights epoch."""
        return self._store.weights().epoch

    def revoked(self) -> frozenset[str]:
        """Experts that must not be loaded."""
        return self._store.weights().revoked

    def revocation_epochs(self) -> dict[str, int]:
        """The epoch of each expert's last revocation: what was loaded before it must not be served."""
        return self._store.revocation_epochs()

    def added(self) -> tuple[Added, ...]:
        """Experts that came from packages, in the order in which they came; raises `StoreDamaged`."""
        return tuple(map(_added, self._store.weights().added))

    def slots_of_others(self, expert: str) -> frozenset[int]:
        """The slots of all other packages, also of those that this start did not load and a later one may."""
        return frozenset(entry.slot for entry in self.added() if entry.expert != expert)

    def require_owner(self, manifest: Manifest) -> None:
        """Refuse a package whose id belongs to another owner; raises `ChangeConflict`."""
        known = self._store.snapshot().experts.get(ExpertId(manifest.id))
        if known is not None:
            _require_owner(known, manifest)

    def add(self, manifest: Manifest, added: Added, *, actor: str, at: float) -> None:
        """Commit that an expert is loaded. No tenant may use it until an agreement permits it.

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
                "merged_version": added.merged,
                **({} if added.rank is None else {"rank": added.rank}),
            }
            epoch = change.add_weights(added.expert, slot=added.slot, package=added.package, detail=detail)
            if epoch != added.slot_epoch:
                raise ChangeConflict(
                    "Another process changed the experts of this store at the same time. Try again.",
                    code="experts_changing",
                )

    def revoke(self, expert: str, slot: int, *, actor: str, at: float) -> int:
        """Commit that an expert must not be loaded; returns the weights epoch."""
        with self._store.change(actor=actor, note=f"revoke expert {expert}", at=at, urgent=True) as change:
            known = change.get(Expert, expert)
            if known is not None:
                change.put(known.model_copy(update={"live": False}))
            return change.revoke_weights(expert, slot=slot, detail={})


def _added(change: WeightsChange) -> Added:
    try:
        detail = _Detail.model_validate(change.detail, strict=True)
    except ValidationError as error:
        raise damaged("change of weights", {"id": change.epoch}, error) from error
    return Added(
        change.expert,
        detail.version,
        change.slot,
        change.epoch,
        change.package or "",
        detail.weights_digest,
        detail.base_digest,
        detail.merged_version,
        detail.rank,
    )


def _put(change: Change, manifest: Manifest) -> None:
    public = change.get(Expert, PUBLIC)
    if manifest.rank is not None and public is not None:
        change.put(public.model_copy(update={"grade": weakest(public.grade, "shared")}))
    known = change.get(Expert, manifest.id)
    if known is not None:
        _require_owner(known, manifest)
    change.put(
        Expert(
            id=manifest.id,
            owner=manifest.owner,
            domain=manifest.domain[:MAX_DOMAIN],
            live=True,
            visibility="listed" if known is None else known.visibility,
            required=known is not None and known.required,
            grade=_grade(manifest, known),
            empty_layers=frozenset(),  # a package has an expert in every layer
        )
    )


def _grade(manifest: Manifest, known: Expert | None) -> Grade:
    """What excluding an added expert excludes.

    Its base is the served one, which never saw it; routers that are served may have been tuned with its own. No package
    raises a grade that is stored: shared weights go on having learnt from what it replaces.
    """
    added: Grade = "removed" if manifest.training.router == "own" else "router"
    return added if known is None else weakest(added, known.grade)


def _require_owner(known: Expert, manifest: Manifest) -> None:
    if known.owner != manifest.owner:
        raise ChangeConflict(
            f"The id '{manifest.id}' cannot be used by '{manifest.owner}'. Choose another one.",
            code="expert_of_another_owner",
        )
