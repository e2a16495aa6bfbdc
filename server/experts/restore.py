"""Added and revoked experts, as a start finds them in the store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from flexgate.policies.documents import Grade
from flexgate.policies.store.store import Store
from flexgate.server.experts.errors import PackageRefused
from flexgate.server.experts.repository import Added, WeightsRepository
from flexgate.server.experts.versions import Merged, is_set_aside

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AtStart:
    """The last acknowledged state.

    Attributes:
        without: experts of the checkpoint that must not be loaded: revoked, or replaced by a package.
        least_slots: slots that added experts need.
        epoch: the newest weights epoch.
        resident: what will be served, in slot order.
        ranks: slot and rank of each low-rank expert that is added again.
        set_aside: packages that were added and are not loaded, since the checkpoint holds a newer version; a
            sentence each.
    """

    without: frozenset[str]
    least_slots: int
    epoch: int
    resident: tuple[Loaded, ...]
    set_aside: tuple[str, ...]
    ranks: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def at_start(store: Store, checkpoint: Sequence[Loaded], merged: Merged) -> AtStart:
    """Read the state from a migrated store.

    Raises:
        PackageRefused: versions cannot be compared, or the slot of an expert that was added is also another's.
    """
    state = store.weights()
    packages = WeightsRepository(store).added()
    old = [package for package in packages if is_set_aside(package, merged)]
    added = [package for package in packages if package not in old]
    without = state.revoked | {change.expert for change in added}
    _require_own_slots(added, checkpoint, without)
    kept = tuple(expert for expert in checkpoint if expert.id not in without)
    catalogue = store.snapshot().experts if added else {}
    known = {str(id_): expert for id_, expert in catalogue.items()}
    resident = (*kept, *(known[change.expert] for change in added if change.expert in known))
    least = 1 + max((change.slot for change in added if change.rank is None), default=-1)
    ranks = {change.expert: (change.slot, change.rank) for change in added if change.rank is not None}
    set_aside = tuple(
        f"added package {package.expert} version {package.version}: the checkpoint's version "
        f"{merged[package.expert]} is newer and is served"
        for package in old
    )
    for sentence in set_aside:
        logger.warning("set aside: %s", sentence)
    return AtStart(frozenset(without), least, state.epoch, resident, set_aside, ranks)


def require_ranks(before: AtStart, rank_of: Callable[[int], int | None]) -> None:
    """Refuse a start whose slots have no room for what was added to them; raises `PackageRefused`.

    Args:
        rank_of: the rank that a slot has room for, None for a full one or none.
    """
    for expert, (slot, rank) in before.ranks.items():
        if (rank_of(slot) or 0) < rank:
            raise PackageRefused(
                f"added expert '{expert}' of rank {rank} has slot {slot}, which has no room for it now: start with the "
                f"former checkpoint and --slots, or with those revoke '{expert}' first"
            )


def _require_own_slots(added: Sequence[Added], checkpoint: Sequence[Loaded], without: Collection[str]) -> None:
    for package in added:
        holders = [expert.id for expert in checkpoint[package.slot : package.slot + 1] if expert.id not in without]
        for holder in holders:
            raise PackageRefused(
                f"added expert '{package.expert}' has slot {package.slot}, which this checkpoint needs for '{holder}': "
                f"start with the former checkpoint, revoke '{package.expert}', then start with this one and add it"
            )
    first: dict[int, str] = {}
    for package in added:
        other = first.setdefault(package.slot, package.expert)
        if other != package.expert:
            raise PackageRefused(
                f"two added experts have slot {package.slot}, '{other}' and later '{package.expert}': start with the "
                f"checkpoint that was served when '{package.expert}' was added, revoke it, then start with this "
                "checkpoint and add it"
            )


class Loaded(Protocol):
    """An expert that will be served."""

    @property
    def id(self) -> str: ...
    @property
    def owner(self) -> str | None: ...
    @property
    def domain(self) -> str: ...
    @property
    def required(self) -> bool: ...
    @property
    def grade(self) -> Grade: ...
