"""`/v1/receipts`: signed receipts of requests, to each party as far as they concern it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from flexgate.policies.documents import Role
from flexgate.policies.snapshot import Snapshot
from flexgate.server.admin.operation import Call, Json, Nothing
from flexgate.server.admin.receipts.schemas import BatchPage, ListBatches, Receipt, SignedHeader
from flexgate.server.admin.router import OperationRouter
from flexgate.server.http.errors import ApiError, NotFound, Unavailable
from flexgate.server.http.refusals import not_found
from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.receipts.book import BookError
from flexgate.server.ledger.receipts.service import NoReceipt, Reader, ReceiptDamaged, ReceiptPending

_EVERYONE: Final = (Role.ADMIN, Role.AUDITOR, Role.TENANT, Role.OWNER)
router: Final = OperationRouter()
logger = logging.getLogger(__name__)


@router.operation("GET", "/v1/receipts/{receipt_id}", roles=_EVERYONE, response=Receipt)
def retrieve(call: Call[Nothing, Nothing]) -> Json:
    """Show a request's receipt: a tenant its own requests', an owner its own leaf."""
    caller = call.principal
    with translated(tell=caller.tenant_id is None and caller.owner_id is None):
        receipt = call.services.receipts.show(call.path["receipt_id"], Reader(caller.tenant_id, caller.owner_id))
    if _has_no_owners(call.snapshot, receipt):
        raise NotFound(
            "The experts of this model have no owners ('ownership: none'): the request used nothing that an agreement "
            "permits, and a receipt would promise rights that there are not. Its usage is at "
            "GET /v1/organization/usage/completions.",
            code="receipt_without_owners",
        )
    return receipt


@router.operation("GET", "/v1/receipt_batches", roles=(Role.ADMIN, Role.AUDITOR))
def batches(call: Call[Nothing, ListBatches]) -> BatchPage:
    """List the signed headers of batches: the chain that all receipts are in. It tells how many requests came when."""
    limit = call.query.limit
    with translated(tell=True):
        receipts = call.services.receipts
        found = receipts.newest() if call.query.newest else receipts.chain(call.query.after, limit + 1)
    return BatchPage(data=[SignedHeader.model_validate(one) for one in found[:limit]], has_more=len(found) > limit)


def _has_no_owners(snapshot: Snapshot, receipt: Json) -> bool:
    """Whether neither the model that is served has an owner, nor what took part in the request."""
    if any(expert.owner is not None for expert in snapshot.experts.values() if expert.live):
        return False
    shares = (share for leaf in receipt["leaves"] for share in leaf["content"].get("experts", ()))
    return all("owner" in share and share["owner"] is None for share in shares)


@contextmanager
def translated(*, tell: bool) -> Iterator[None]:
    """Turn the receipts' errors into responses; `tell` names causes that are the operator's."""
    try:
        yield
    except NoReceipt:
        raise not_found() from None
    except ReceiptPending as error:
        why = f" Why: {error}." if tell else ""
        raise Unavailable(
            f"The request is recorded, and its receipt is not made yet. Try again.{why}", code="receipt_pending"
        ) from error
    except ReceiptDamaged as error:
        logger.error("%s", error)
        raise ApiError(
            "The record of this request does not fit the receipt that was signed for it. Tell the operator.",
            code="receipt_damaged",
        ) from error
    except (LedgerError, BookError) as error:
        logger.error("receipts cannot be read: %s", error)
        raise Unavailable("Receipts cannot be read now. Try again.", code="receipts_unavailable") from error
