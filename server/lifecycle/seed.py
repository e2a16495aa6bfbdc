"""The policy store at start: migrated, with the checkpoint's experts and a first key in it.

A manifest names an expert's owner as people write it ("Tarnholm Gazette"); agreements name owners
by id. A name that is no id becomes one here ("tarnholm-gazette"), and two names that would become
the same id are refused, because one owner's agreements would then hold for the other's experts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Final

from flexgate.experts.checkpoint.ownership import Ownership
from flexgate.policies.documents import Expert, Grade, Role, weakest
from flexgate.policies.errors import ChangeRefused
from flexgate.policies.ids import PUBLIC
from flexgate.policies.store import demo
from flexgate.policies.store.catalogue import ManifestExpert, put_catalogue
from flexgate.policies.store.store import Store
from flexgate.server.experts.restore import Loaded

_OWNER_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ACTOR: Final = "flexgate serve"


class DemoKeysFound(Exception):
    """The store holds the demo's well-known keys, and this is no demo."""


class ManifestRefused(Exception):
    """The checkpoint's manifest names owners that the policy cannot tell apart."""


def prepare_demo(
    store: Store,
    experts: Iterable[Loaded],
    *,
    epoch: int,
    at: float,
    ownership: Ownership | None = None,
    public_kept: bool = False,
) -> None:
    """Migrate and seed the demo's store."""
    store.migrate()
    demo.seed(store, _manifest(experts, ownership, public_kept), epoch=epoch, at=at, held=_held(ownership))
    _require_required(store.snapshot().experts.values(), store.weights().revoked)


def prepare(
    store: Store,
    experts: Iterable[Loaded],
    *,
    epoch: int,
    at: float,
    ownership: Ownership | None = None,
    public_kept: bool = False,
) -> None:
    """Migrate, and add unknown experts without any agreement.

    Args:
        ownership: whose the checkpoint's experts are, also of those that are not served; None holds nothing else.
        public_kept: an added low-rank expert contains the public one, whose exclusion leaves that in place.

    Raises:
        DemoKeysFound: before anything is changed but the schema.
        ChangeRefused: experts were added or revoked since the weights epoch `epoch`, at which `experts` was read; or
            every request requires one that is not among them, though it was not revoked.
    """
    store.migrate()
    if demo.holds_demo_keys(store):
        raise DemoKeysFound(
            "the policy database contains the well-known demo keys; use another database, or start with --demo"
        )
    revoked = store.weights().revoked
    with store.change(actor=_ACTOR, note="start", at=at) as change:
        put_catalogue(change, _manifest(experts, ownership, public_kept), epoch=epoch, held=_held(ownership))
        _require_required(change.all(Expert), revoked)


def _require_required(experts: Iterable[Expert], revoked: Collection[str]) -> None:
    """Refuse a start that could answer nothing; what was revoked can be added while the server runs."""
    for expert in experts:
        if expert.required and not expert.live and expert.id not in revoked:
            raise ChangeRefused(
                f"every request requires expert {expert.id!r}, which this checkpoint does not have: serve one that has "
                "it, or remove it from 'required_experts' with 'flexgate policy apply'"
            )


def first_admin_key(store: Store, *, at: float) -> str | None:
    """An admin key, if there never was one; the caller shows it at once, for it cannot be shown again."""
    if any(key.role is Role.ADMIN for key in store.keys()):
        return None
    with store.change(actor=_ACTOR, note="first admin key", at=at) as change:
        return change.mint_key(Role.ADMIN).secret


def owner_id(name: str) -> str:
    """The id of the owner that a manifest names; raises `ManifestRefused` when there is none."""
    if _OWNER_ID.fullmatch(name):
        return name
    id_ = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:63].rstrip("-")
    if not id_:
        raise ManifestRefused(f"the manifest's owner {name!r} has no letters to make an id of")
    return id_


def _manifest(experts: Iterable[Loaded], ownership: Ownership | None, public_kept: bool) -> list[ManifestExpert]:
    names: dict[str, str] = {}
    empty = {} if ownership is None else ownership.empty_layers

    def grade(expert: Loaded) -> Grade:
        return weakest(expert.grade, "shared") if public_kept and expert.id == PUBLIC else expert.grade

    return [
        ManifestExpert(e.id, _one_id(e.owner, names), e.domain, e.required, grade(e), empty.get(e.id, frozenset()))
        for e in experts
    ]


def _held(ownership: Ownership | None) -> dict[str, Grade]:
    if ownership is None:
        return {}
    return {**ownership.former_units, **{unit.id: unit.grade for unit in ownership.units}}


def _one_id(owner: str | None, names: dict[str, str]) -> str | None:
    """The id of an owner, where no other of `names` has it; `names` gets it."""
    if owner is None:
        return None
    id_ = owner_id(owner)
    if names.setdefault(id_, owner) != owner:
        raise ManifestRefused(f"the manifest's owners {names[id_]!r} and {owner!r} have the same id {id_!r}")
    return id_
