"""The policy store at start: migrated, with the checkpoint's experts and a first key in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol

from flexgate.policies.store import demo
from flexgate.policies.store.catalogue import ManifestExpert, put_catalogue
from flexgate.policies.store.store import Store
from flexgate.policies.tenants import Role

_ACTOR: Final = "flexgate serve"


class DemoKeysFound(Exception):
    """The store holds the demo's well-known keys, and this is no demo."""


class Loaded(Protocol):
    """An expert of the checkpoint."""

    @property
    def id(self) -> str: ...
    @property
    def owner(self) -> str: ...
    @property
    def domain(self) -> str: ...


def prepare_demo(store: Store, experts: Iterable[Loaded], *, at: float) -> None:
    """Migrate and seed the demo's store."""
    store.migrate()
    demo.seed(store, _manifest(experts), at=at)


def prepare(store: Store, experts: Iterable[Loaded], *, at: float) -> str | None:
    """Migrate, add unknown experts without any agreement, and make a first admin key.

    Returns:
        The admin key when it was made now: the only time that it can be shown.

    Raises:
        DemoKeysFound: before anything is changed but the schema.
    """
    store.migrate()
    if demo.holds_demo_keys(store):
        raise DemoKeysFound("the policy database holds the demo's public keys; use another one, or start with --demo")
    has_admin = any(key.role is Role.ADMIN for key in store.keys())  # noqa: SIM118 (not a mapping)
    with store.change(actor=_ACTOR, note="start", at=at) as change:
        put_catalogue(change, _manifest(experts))
        return None if has_admin else change.mint_key(Role.ADMIN).secret


def _manifest(experts: Iterable[Loaded]) -> list[ManifestExpert]:
    return [ManifestExpert(e.id, e.owner, e.domain) for e in experts]
