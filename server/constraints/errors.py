"""Why a constraint cannot be kept."""

from __future__ import annotations


class ConstraintError(ValueError):
    """A constraint that this server does not follow; the message says why, for the client."""


class Unenforceable(ConstraintError):
    """A part of a constraint that the compiler would ignore or read in another way."""
