"""The demo's tenants, agreements and well-known keys. Their secrets are public: never serve them
beyond loopback, and refuse a normal start on a store for which `holds_demo_keys` is true.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import select

from flexgate.policies.agreements import Agreement
from flexgate.policies.documents import Expert, Grade, Role, Tenant
from flexgate.policies.ids import PUBLIC
from flexgate.policies.store import schema
from flexgate.policies.store.catalogue import ManifestExpert, put_catalogue
from flexgate.policies.store.change import Change
from flexgate.policies.store.database import reading
from flexgate.policies.store.keys import digest
from flexgate.policies.store.store import Store

_ACTOR: Final = "demo"
_CONTEXT: Final = {"purposes": ["ai-input", "search"], "regions": ["DE", "US"]}
_QUOTA: Final = {"requests_per_minute": 6_000, "tokens_per_minute": 1_000_000, "concurrent_requests": 128}
"""More than a person or a test asks for, and a bound on what a script can."""
_TENANTS: Final[dict[str, dict[str, Any]]] = {
    "sk-demo-all": {"id": "proj_demo_all", "name": "Demo: all", "mode": "deny_list"},
    "sk-demo-press": {"id": "proj_demo_press", "name": "Demo: press", "expert_ids": ["news"]},
    "sk-demo-public": {"id": "proj_demo_public", "name": "Demo: public"},
}
_PAID_EXPERT: Final = "legal"
"""Its owner has a key, and is paid; the others let their experts be used for nothing."""
_DUTIES: Final = (
    {"kind": "compensate", "rate": "2", "currency": "EUR", "unit": "thousand_share_weighted_tokens"},
    {"kind": "report", "period": "month"},
)
_OWNER_KEY: Final = "sk-demo-owner"
_ADMIN_KEY: Final = "sk-demo-admin"
DEMO_KEYS: Final = (*_TENANTS, _OWNER_KEY, _ADMIN_KEY)


def seed(
    store: Store,
    experts: Iterable[ManifestExpert],
    *,
    epoch: int,
    at: float,
    held: Mapping[str, Grade] | None = None,
) -> None:
    """Put the demo and the checkpoint's experts into a migrated store. `at` is Unix seconds.

    `experts`, `epoch` and `held` are those of `put_catalogue`; the experts include `news`. On a store that has the demo
    already only the catalogue is brought up to date, so that what an administrator changed stays
    changed, and an expert that is new gets no agreement.
    """
    with store.change(actor=_ACTOR, note="demo", at=at) as change:
        catalogue = put_catalogue(change, experts, epoch=epoch, held=held)
        if not change.has_key(_ADMIN_KEY):
            _put_first(change, catalogue)


def _put_first(change: Change, catalogue: list[Expert]) -> None:
    paid = next((expert.owner for expert in catalogue if expert.id == _PAID_EXPERT), None)
    for owner in sorted({expert.owner for expert in catalogue if expert.id != PUBLIC and expert.owner is not None}):
        change.put(_open_agreement(owner, catalogue, _DUTIES if owner == paid else ()))
    for secret, values in _TENANTS.items():
        tenant = Tenant.model_validate(values | _CONTEXT | {"quota": _QUOTA})
        change.put(tenant)
        change.add_key(secret, prefix=secret, role=Role.TENANT, tenant_id=tenant.id)
    if paid is not None:
        change.add_key(_OWNER_KEY, prefix=_OWNER_KEY, role=Role.OWNER, owner_id=paid)
    change.add_key(_ADMIN_KEY, prefix=_ADMIN_KEY, role=Role.ADMIN)


def _open_agreement(owner: str, catalogue: list[Expert], duties: Sequence[Mapping[str, str]]) -> Agreement:
    return Agreement.model_validate(
        {
            "id": f"demo-{owner}",
            "owner": owner,
            "experts": [e.id for e in catalogue if e.owner == owner and e.id != PUBLIC],
            "assignee": "everyone",
            "effect": "permit",
            "duties": duties,
        }
    )


def holds_demo_keys(store: Store) -> bool:
    """Whether any well-known demo key was ever put into the store."""
    digests = [digest(secret) for secret in DEMO_KEYS]
    query = select(schema.api_keys.c.id).where(schema.api_keys.c.sha256.in_(digests)).limit(1)
    with reading(store.engine) as connection:
        return connection.execute(query).one_or_none() is not None
