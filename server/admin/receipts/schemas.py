"""Receipts as they are sent, in canonical JSON; docs/receipts.md is their format."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from flexgate.server.http.schemas import Shown, is_none
from flexgate.server.http.validation import Closed


class ListBatches(Closed):
    """Batches after the one of a number, or the newest alone."""

    after: int = Field(0, ge=0, le=2**62)
    limit: int = Field(100, ge=1, le=1000)
    newest: bool = False


class BatchHeader(Shown):
    """What is signed: numbers of the receipts, the root over them, and the hash of the header before it."""

    at: str
    first: str
    format: str
    kid: str
    last: str
    number: str
    previous: str
    root: str
    server: str


class SignedHeader(Shown):
    """A batch in the chain."""

    header: BatchHeader
    signature: str


class BatchPage(Shown):
    """Batches in their order."""

    object: Literal["list"] = "list"
    data: list[SignedHeader]
    has_more: bool


class ReceiptBatch(Shown):
    """The batch that a receipt is in, and the path to its root."""

    header: BatchHeader
    path: list[str]
    signature: str


class ReceiptLeaf(Shown):
    """A leaf, and its place among the receipt's hashes."""

    content: dict[str, Any]
    index: int
    salt: str


class Receipt(Shown):
    """The leaves of a receipt that concern the key's tenant or owner. `opening` is for the tenant alone."""

    batch: ReceiptBatch
    format: str
    hashes: list[str]
    leaves: list[ReceiptLeaf]
    number: str
    opening: Annotated[str | None, Field(exclude_if=is_none)] = None
