"""Agreements at the wire. An owner reads and writes pseudonyms of tenants."""

from __future__ import annotations

from typing import Any, Final, Literal

from flexgate.policies.agreements import Agreement, Duty, Effect
from flexgate.policies.ids import AgreementIdField, OwnerIdField
from flexgate.policies.store.documents import to_json
from flexgate.policies.store.pseudonyms import Pseudonyms
from flexgate.server.admin.pages import Deleted, Identified, PageOf
from flexgate.server.http.errors import Invalid

_TENANT: Final = "tenant:"


class AgreementBody(Agreement):
    """An agreement as sent by a client. The server sets id and version, and for an owner's key the owner."""

    id: AgreementIdField | None = None  # type: ignore[assignment]
    version: int | None = None  # type: ignore[assignment]
    owner: OwnerIdField | None = None  # type: ignore[assignment]


class AgreementObject(Identified):
    """The newest version of an agreement. An owner reads pseudonyms of tenants."""

    object: Literal["agreement"] = "agreement"
    version: int
    owner: str
    experts: list[str]
    assignee: str
    effect: Effect
    purposes: list[str] | None
    regions: list[str] | None
    not_before: str | None
    not_after: str | None
    duties: list[Duty]
    license_expression: str | None
    terms_uri: str | None
    terms_sha256: str | None


class AgreementPage(PageOf[AgreementObject]):
    """A part of the list of agreements."""


class AgreementDeleted(Deleted):
    """An agreement that was terminated."""

    object: Literal["agreement.deleted"] = "agreement.deleted"


def agreement_object(agreement: Agreement, names: Pseudonyms | None) -> AgreementObject:
    """An agreement; `names` are an owner's names for tenants."""
    values = to_json(agreement)
    if names is not None and agreement.assignee.startswith(_TENANT):
        values["assignee"] = _TENANT + names.of(agreement.assignee.removeprefix(_TENANT))
    return AgreementObject(**values)


def agreement_fields(written: Agreement, names: Pseudonyms | None, tenant_ids: Any) -> dict[str, Any]:
    """What a body says, without what it leaves out, and with an owner's names resolved; raises `Invalid`."""
    values = written.model_dump(exclude_unset=True)
    values = {name: value for name, value in values.items() if value is not None}
    if names is not None and written.assignee.startswith(_TENANT):
        values["assignee"] = _TENANT + _resolved(written.assignee.removeprefix(_TENANT), names, tenant_ids)
    return values


def _resolved(name: str, names: Pseudonyms, tenant_ids: Any) -> str:
    tenant = names.resolve(name, tenant_ids)
    if tenant is None:
        raise Invalid(
            f"There is no project that you know as '{name}': name it as your statements and agreements do.",
            param="assignee",
            code="invalid_value",
        )
    return tenant
