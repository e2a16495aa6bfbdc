"""Make the catalogue say what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from flexgate.policies.store.change import Change
from flexgate.policies.store.store import Store
from flexgate.policies.tenants import Expert

_ACTOR: Final = "checkpoint"


class ManifestExpert(NamedTuple):
    """One expert of the checkpoint's manifest."""

    id: str
    owner: str
    domain: str


def sync_catalogue(store: Store, experts: Iterable[ManifestExpert], *, at: float) -> None:
    """Add unknown experts (nobody gets them by that) and set which ones are live.

    Run it at every start, before the first snapshot; `experts` come in slot order and include
    `public`. Experts that the checkpoint lacks stay in the catalogue, not live. An expert that
    changed its owner while terms name it is refused (`ChangeRefused`). `at` is Unix seconds.
    """
    with store.change(actor=_ACTOR, note="catalogue", at=at) as change:
        put_catalogue(change, experts)


def put_catalogue(change: Change, experts: Iterable[ManifestExpert]) -> list[Expert]:
    """The same inside a running change; returns the live experts."""
    live = []
    for manifest in experts:
        known = change.get(Expert, manifest.id)
        visibility = known.visibility if known else "listed"
        expert = Expert.model_validate({**manifest._asdict(), "visibility": visibility})
        change.put(expert)
        live.append(expert)
    present = {expert.id for expert in live}
    for expert in change.all(Expert):
        if expert.id not in present:
            change.put(expert.model_copy(update={"live": False}))
    return live
