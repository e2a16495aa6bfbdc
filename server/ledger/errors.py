"""What goes wrong with the ledger."""


class LedgerError(Exception):
    """The ledger cannot be opened, read or written; the message says why and what to do."""


class TooMuchAsked(LedgerError):
    """There is more to sum than one query may ask for; the message says what to leave out."""
