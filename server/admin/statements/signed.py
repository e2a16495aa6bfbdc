"""`/v1/statements/{period}/signed`: what is owed to an owner, signed, and the receipts that it counts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

from flexgate.policies.documents import Role
from flexgate.server.admin.operation import Call, Json, Nothing
from flexgate.server.admin.receipts.endpoints import translated
from flexgate.server.admin.router import OperationRouter
from flexgate.server.admin.statements.asked import ROLES, advice, is_open, owner_of, period_of, require_whole
from flexgate.server.admin.statements.schemas import (
    ListStatementReceipts,
    OfOwner,
    OwnersSums,
    ProveReceipt,
    SignedStatement,
    StatementProof,
    StatementReceiptPage,
)
from flexgate.server.http.errors import Invalid, Unavailable
from flexgate.server.http.refusals import from_ledger
from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.receipts.owners import sums_of_owners
from flexgate.server.ledger.receipts.service import NoReceipt
from flexgate.server.ledger.receipts.signing import SignerUnavailable
from flexgate.server.ledger.receipts.statements import NotInPeriod, Statements
from flexgate.server.ledger.statements import Period
from flexgate.server.ledger.terms import terms_of
from flexgate.server.policy.executors import STATEMENTS

_PATH: Final = "/v1/statements/{period}"
router: Final = OperationRouter()
logger = logging.getLogger(__name__)


@router.operation("GET", f"{_PATH}/signed", roles=ROLES, threads=STATEMENTS, response=SignedStatement)
def sign(call: Call[Nothing, OfOwner]) -> Json:
    """Sign what is owed to an owner for a period, with the root over its receipts; docs/receipts.md is the format."""
    owner, period = owner_of(call), period_of(call)
    ended = not is_open(call, period)
    with _translated(call, period):
        statements, terms = Statements(call.services.receipts), partial(terms_of, call.store)
        return statements.sign(owner, period, terms, at=call.now, ended=ended)


@router.operation("GET", f"{_PATH}/owners", roles=(Role.ADMIN, Role.AUDITOR), threads=STATEMENTS, response=OwnersSums)
def sum_owners(call: Call[Nothing, Nothing]) -> Json:
    """Sign what all owners' experts did in a period, with each owner's part, for auditors and administrators alone."""
    period = period_of(call)
    ended = not is_open(call, period)
    with _translated(call, period):
        return sums_of_owners(call.services.receipts, period, partial(terms_of, call.store), at=call.now, ended=ended)


@router.operation("GET", f"{_PATH}/receipts", roles=ROLES, threads=STATEMENTS, response=StatementReceiptPage)
def list_receipts(call: Call[Nothing, ListStatementReceipts]) -> Json:
    """List an owner's copies of its receipts of a period, by their numbers."""
    owner, period, query = owner_of(call), period_of(call), call.query
    with _translated(call, period):
        found = Statements(call.services.receipts).page(owner, period, after=query.after, limit=query.limit + 1)
    return {"object": "list", "data": found[: query.limit], "has_more": len(found) > query.limit}


@router.operation("GET", f"{_PATH}/receipts/{{receipt_id}}", roles=ROLES, threads=STATEMENTS, response=StatementProof)
def prove(call: Call[Nothing, ProveReceipt]) -> Json:
    """Show the path from a receipt to the root of a signed statement, a provisional one by its `last`."""
    owner, period, receipt = owner_of(call), period_of(call), call.path["receipt_id"]
    with _translated(call, period):
        return Statements(call.services.receipts).prove(owner, period, receipt, last=call.query.last)


@contextmanager
def _translated(call: Call[Any, Any], period: Period) -> Iterator[None]:
    """Turn errors into responses; operators are told what is the server's own fault."""
    tell = call.principal.owner_id is None
    try:
        with translated(tell=tell):
            try:
                yield
                require_whole(call, period)
            except NoReceipt:
                require_whole(call, period)  # else an honest server would say that it has no proof
                raise
            except LedgerError as error:
                raise from_ledger(error, param="period", advice=advice(period)) from error
    except NotInPeriod:
        raise Invalid(
            f"No statement of '{period.name}' counts this receipt: its request ended in another period, or its number "
            "is above 'last'.",
            param="receipt_id",
            code="not_in_statement",
        ) from None
    except SignerUnavailable as error:
        logger.error("no statement can be signed: %s", error)
        why = f" Why: {error}." if tell else ""
        raise Unavailable(f"The statement cannot be signed now. Try again.{why}", code="statement_unsigned") from error
