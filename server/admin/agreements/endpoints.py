"""`/v1/agreements`: what owners let tenants use.

Administrators see all; an owner sees and changes its own, and may always end one. Another owner's
agreement is to it as one that does not exist.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from flexgate.policies.documents import Role
from flexgate.policies.store import agreements
from flexgate.policies.store.pseudonyms import Pseudonyms, read_pseudonyms
from flexgate.policies.withhold import Withholding, without_agreement
from flexgate.server.admin.agreements.schemas import (
    AgreementBody,
    AgreementDeleted,
    AgreementObject,
    AgreementPage,
    agreement_fields,
    agreement_object,
)
from flexgate.server.admin.operation import Call, Nothing, Page, Written
from flexgate.server.admin.pages import page_of
from flexgate.server.admin.router import OperationRouter

_ALL: Final = "/v1/agreements"
_ONE: Final = f"{_ALL}/{{agreement_id}}"
_READ: Final = (Role.ADMIN, Role.AUDITOR, Role.OWNER)
_WRITE: Final = (Role.ADMIN, Role.OWNER)
router: Final = OperationRouter()


def _withheld(call: Call[Any, Any]) -> Withholding:
    return partial(without_agreement, agreement_id=call.path["agreement_id"], owner_id=call.principal.owner_id)


@router.operation("GET", _ALL, roles=_READ)
def list_(call: Call[Nothing, Page]) -> AgreementPage:
    """List agreements that were not terminated, oldest first."""
    found = agreements.list_agreements(call.store, owner_id=call.principal.owner_id)
    chosen, more = page_of(found, call.query, lambda agreement: agreement.id)
    names = _names(call)
    return AgreementPage.of([agreement_object(agreement, names) for agreement in chosen], more=more)


@router.operation("POST", _ALL, roles=_WRITE)
def create(call: Call[AgreementBody, Written]) -> AgreementObject:
    """Create an agreement. Unknown fields, and duties that cannot be executed together, are refused."""
    names = _names(call)
    fields = agreement_fields(call.body, names, call.snapshot.tenants)
    return agreement_object(agreements.create_agreement(call.store, fields, **_attributed(call)), names)


@router.operation("GET", _ONE, roles=_READ)
def retrieve(call: Call[Nothing, Nothing]) -> AgreementObject:
    """Show the newest version of an agreement that was not terminated."""
    agreement_id, owner_id = call.path["agreement_id"], call.principal.owner_id
    return agreement_object(agreements.get_agreement(call.store, agreement_id, owner_id=owner_id), _names(call))


@router.operation("POST", _ONE, roles=_WRITE)
def revise(call: Call[AgreementBody, Written]) -> AgreementObject:
    """Replace an agreement as a whole with its next version."""
    names = _names(call)
    fields = agreement_fields(call.body, names, call.snapshot.tenants)
    agreement_id = call.path["agreement_id"]
    return agreement_object(agreements.revise_agreement(call.store, agreement_id, fields, **_attributed(call)), names)


@router.operation("DELETE", _ONE, roles=_WRITE, withholds=_withheld)
def terminate(call: Call[Nothing, Written]) -> AgreementDeleted:
    """Terminate an agreement now. It stays in the history of the policy."""
    agreement_id = call.path["agreement_id"]
    agreements.terminate_agreement(call.store, agreement_id, **_attributed(call))
    return AgreementDeleted(id=agreement_id)


def _attributed(call: Call[Any, Any]) -> dict[str, Any]:
    return {"owner_id": call.principal.owner_id, **call.attributed}


def _names(call: Call[Any, Any]) -> Pseudonyms | None:
    owner_id = call.principal.owner_id
    return None if owner_id is None else read_pseudonyms(call.store.engine, owner_id)
