"""`--slots full=2,r64=8`: free slots by the size of the experts that they have room for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

MOST: Final = 63
"""Slots beside the public expert's that a gate has bits for."""
_KIND: Final = re.compile(r"(full|r([1-9][0-9]{0,6}))=([0-9]{1,2})")


@dataclass(frozen=True, slots=True)
class SlotKinds:
    """What `--slots` asks for.

    Attributes:
        full: full slots beside the checkpoint's experts; None where `--slots` is not given.
        ranks: of each slot for a low-rank expert, in the order in which they were named.
    """

    full: int | None = None
    ranks: tuple[int, ...] = ()


def parse_slot_kinds(text: str) -> SlotKinds:
    """Read `--slots`; a kind that is not named has no slots. Raises `ValueError` with a sentence."""
    full, ranks = 0, list[int]()
    named: set[str] = set()
    for part in text.split(","):
        found = _KIND.fullmatch(part.strip())
        if found is None:
            raise ValueError(
                f"--slots {text[:80]!r}: {part.strip()[:40]!r} is not a kind and a number, as in full=2,r64=8"
            )
        kind, rank, count = found.groups()
        if kind in named:
            raise ValueError(f"--slots {text[:80]!r} names {kind} twice")
        named.add(kind)
        if rank is None:
            full = int(count)
        else:
            ranks += [int(rank)] * int(count)
        if full + len(ranks) > MOST:
            raise ValueError(f"--slots {text[:80]!r} asks for more than {MOST} slots")
    return SlotKinds(full, tuple(ranks))
