"""`/v1/corrections`: corrections of what is owed, and owners' disputes. To an owner, only its own exist."""

from __future__ import annotations

import secrets
from typing import Any, Final

from flexgate.policies.audit import Event
from flexgate.policies.documents import Role
from flexgate.server.admin.corrections.schemas import AddCorrection, Correction, CorrectionPage, ListCorrections, shown
from flexgate.server.admin.operation import Call, Nothing
from flexgate.server.admin.router import OperationRouter
from flexgate.server.http.errors import Forbidden, Invalid
from flexgate.server.http.refusals import from_ledger, not_found
from flexgate.server.http.responses import CREATED
from flexgate.server.ledger import corrections
from flexgate.server.ledger.corrections import CorrectionRefused, Made
from flexgate.server.ledger.errors import LedgerError

_CODE: Final = "correction_refused"
router: Final = OperationRouter(prefix="/v1/corrections")


@router.operation("GET", roles=(Role.ADMIN, Role.AUDITOR, Role.OWNER))
def list_corrections(call: Call[Nothing, ListCorrections]) -> CorrectionPage:
    """List corrections and disputes, an owner's or all, in the order in which they were added."""
    own, query = call.principal.owner_id, call.query
    if own is not None and query.owner_id not in (None, own):
        raise not_found()
    try:
        found = call.services.ledger.corrections.read(own or query.owner_id, after=query.after, limit=query.limit + 1)
    except LedgerError as error:
        raise from_ledger(error) from error
    return CorrectionPage(data=list(map(shown, found[: query.limit])), has_more=len(found) > query.limit)


@router.operation("POST", roles=(Role.ADMIN, Role.OWNER), status=CREATED)
def add(call: Call[AddCorrection, Nothing]) -> Correction:
    """Add a correction, decide a dispute, or open one; what was added is never changed."""
    made = _made(call)

    def audit(row: corrections.Correction) -> None:
        detail = {**row.made._asdict(), "at": row.at}
        call.store.record([Event(at=call.now, actor=call.principal.key_id, action=f"{row.kind}.added", detail=detail)])

    try:
        return shown(call.services.ledger.corrections.add(made, actor=call.principal.key_id, audit=audit))
    except CorrectionRefused as error:
        text = str(error)
        raise Invalid(f"{text[:1].upper()}{text[1:]}.", param=error.field, code=_CODE) from error
    except LedgerError as error:
        raise from_ledger(error) from error


def _made(call: Call[AddCorrection, Any]) -> Made:
    own, body = call.principal.owner_id, call.body
    owner = own or body.owner_id
    if owner is None:
        raise Invalid("Name the owner in 'owner_id'.", param="owner_id", code=_CODE)
    if own is not None and body.owner_id not in (None, own):
        raise not_found()
    if (body.kind == "dispute") != (own is not None):
        raise Forbidden("Owners open disputes; administrators make corrections and rejections.", param="kind")
    if body.kind == "correction" and body.id is None:
        raise Invalid("Give the correction an 'id': repeated with it, it is added once.", param="id", code=_CODE)
    id_ = body.id or f"cor_{secrets.token_hex(12)}"
    return Made(id_, body.kind, owner, body.receipt_id, body.reason, body.amount, body.currency, body.dispute_id)
