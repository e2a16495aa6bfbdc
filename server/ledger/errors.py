"""What goes wrong with the ledger."""

from __future__ import annotations

from typing import Literal

LedgerFailure = Literal["refuse", "serve"]
"""What requests without duties get while the ledger cannot be written: a refusal, or an unrecorded response."""


class LedgerError(Exception):
    """The ledger cannot be opened, read or written; the message says why and what to do."""


class TooMuchAsked(LedgerError):
    """There is more to sum than one query may ask for; the message says what to leave out."""


class LedgerClosed(LedgerError):
    """The server is stopping, and takes nothing more."""
