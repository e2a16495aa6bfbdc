"""How long work over many bytes reports how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int], None]
"""Called with the number of bytes just done."""


def silent(_count: int) -> None:
    """Progress that nobody watches."""
