"""What was used in the last minute, exactly: every use is remembered until it is a minute old.

So no minute, wherever it begins, holds more than the limit. Pure: the time is given, in seconds of
a clock that never goes back.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final

MINUTE_S: Final = 60.0


class Use:
    """One use. Its amount may shrink while it is remembered."""

    __slots__ = ("amount", "at")

    def __init__(self, at: float, amount: int) -> None:
        self.at = at
        self.amount = amount


class Window:
    """The uses of the last minute, oldest first."""

    __slots__ = ("_total", "_uses")

    def __init__(self) -> None:
        self._uses: deque[Use] = deque()
        self._total = 0

    def used(self, now: float) -> int:
        """How much was used in the minute that ends now."""
        while self._uses and self._uses[0].at <= now - MINUTE_S:
            self._total -= self._uses.popleft().amount
        return self._total

    def add(self, now: float, amount: int) -> Use:
        """Remember a use."""
        use = Use(now, amount)
        self._uses.append(use)
        self._total += amount
        return use

    def shrink(self, use: Use, amount: int, now: float) -> None:
        """A use turned out to be smaller; one that is older than a minute counts no more anyway."""
        self.used(now)
        if use.at > now - MINUTE_S and amount < use.amount:
            self._total -= use.amount - amount
            use.amount = amount

    def wait(self, limit: int, amount: int, now: float) -> float:
        """Seconds until `amount` more fits under `limit`; infinite when it never does."""
        if amount > limit:
            return math.inf
        excess = self.used(now) + amount - limit
        if excess <= 0:
            return 0.0
        for use in self._uses:
            excess -= use.amount
            if excess <= 0:
                return use.at + MINUTE_S - now
        return math.inf

    def __len__(self) -> int:
        return len(self._uses)
