"""What goes wrong with the ledger."""


class LedgerError(Exception):
    """The ledger cannot be opened, read or written; the message says why and what to do."""
