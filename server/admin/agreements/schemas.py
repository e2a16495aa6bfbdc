"""Agreements at the wire. To an owner, tenants other than by its own word are pseudonyms."""

from __future__ import annotations

from typing import Any, Final

from pydantic import create_model

from flexgate.policies.agreements import Agreement
from flexgate.policies.ids import AgreementIdField, OwnerIdField
from flexgate.policies.store.documents import to_json
from flexgate.policies.store.pseudonyms import Pseudonyms
from flexgate.server.admin.operation import Json

_TENANT: Final = "tenant:"

AgreementBody: Final = create_model(
    "AgreementBody",
    __base__=Agreement,
    id=(AgreementIdField | None, None),
    version=(int | None, None),
    owner=(OwnerIdField | None, None),
)
AgreementBody.__doc__ = (
    """An agreement as it is written. The server gives id and version; an owner's key gives the owner."""
)


def agreement_object(agreement: Agreement, names: Pseudonyms | None) -> Json:
    """An agreement; `names` are an owner's names for tenants."""
    values = to_json(agreement)
    if names is not None and agreement.assignee.startswith(_TENANT):
        values["assignee"] = _TENANT + names.of(agreement.assignee.removeprefix(_TENANT))
    return {"object": "agreement", **values}


def agreement_fields(written: Agreement, names: Pseudonyms | None, tenant_ids: Any) -> dict[str, Any]:
    """What a body says, without what it leaves out, and with an owner's names resolved."""
    values = written.model_dump(exclude_unset=True)
    values = {name: value for name, value in values.items() if value is not None}
    if names is not None and written.assignee.startswith(_TENANT):
        values["assignee"] = _TENANT + names.resolve(written.assignee.removeprefix(_TENANT), tenant_ids)
    return values
