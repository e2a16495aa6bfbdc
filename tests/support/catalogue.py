"""The catalogue of a store, as a start with these experts would leave it."""

from collections.abc import Iterable

from flexgate.policies.store.catalogue import ManifestExpert, put_catalogue
from flexgate.policies.store.store import Store


def sync_catalogue(store: Store, experts: Iterable[ManifestExpert], *, at: float) -> None:
    """One change, at ``at`` (Unix seconds)."""
    with store.change(actor="checkpoint", note="catalogue", at=at) as change:
        put_catalogue(change, experts, epoch=change.weights_epoch())
