"""What one limit has in use, in constant time and memory: a sliding window, requests in flight, a budget.

Every counter has the same five methods, so that a limit over another time, in another unit, or on a share
leased from a store that several replicas use is one more counter and nothing else. `now` is given, in seconds of a
clock that never goes back.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from flexgate.policies.store.budgets import in_period
from flexgate.server.http.errors import Unavailable
from flexgate.server.inference.limits.budget_usage import BudgetUsage
from flexgate.server.ledger.statements import Period, PeriodKind

MINUTE_S: Final = 60.0
BUCKETS: Final = 120
"""Of a window: uses that begin within a 120th of it (half a second of a minute) are counted, and end, together."""


class Counter(Protocol):
    """What is reserved and used of one limit. `Part` is what `reserve` returns; `commit` takes it once."""

    def used(self, now: float) -> int:
        """What counts against the limit now, reservations included."""

    def wait(self, limit: int, amount: int, now: float) -> float:
        """Seconds until `amount` more fits under `limit`: 0 is now, infinite is never by waiting alone."""

    def reset(self, now: float) -> float:
        """Seconds until nothing is in use, if nothing more is reserved."""

    def reserve(self, amount: int, now: float) -> Any:
        """Count `amount` from now on."""

    def commit(self, part: Any, used: int, now: float) -> None:
        """Count `used` instead of what was reserved."""


class _Bucket:
    """Uses that began close together. They leave the window together, when the newest of them is too old."""

    __slots__ = ("amount", "first", "last")

    def __init__(self, now: float) -> None:
        self.first = self.last = now
        self.amount = 0


class SlidingWindow:
    """What was used in the last `seconds`.

    No window of that length, wherever it begins, holds more than the limit. A use counts for at most a 120th of
    the window longer than the window lasts, and exactly as long where uses are rarer than that.
    """

    __slots__ = ("__weakref__", "_buckets", "_grain", "_seconds", "_total")

    def __init__(self, seconds: float = MINUTE_S) -> None:
        self._seconds = seconds
        self._grain = seconds / BUCKETS
        self._buckets: deque[_Bucket] = deque()
        self._total = 0

    def used(self, now: float) -> int:
        """What was used in the window that ends now."""
        while self._buckets and self._buckets[0].last <= now - self._seconds:
            self._total -= self._buckets.popleft().amount
        return self._total

    def wait(self, limit: int, amount: int, now: float) -> float:
        """Seconds until `amount` more fits; goes through `BUCKETS` at most, and only where it does not fit."""
        if amount > limit:
            return math.inf
        excess = self.used(now) + amount - limit
        if excess <= 0:
            return 0.0
        for bucket in self._buckets:
            excess -= bucket.amount
            if excess <= 0:
                return bucket.last + self._seconds - now
        return math.inf

    def reset(self, now: float) -> float:
        """Seconds until the newest use is too old."""
        return self._buckets[-1].last + self._seconds - now if self.used(now) else 0.0

    def reserve(self, amount: int, now: float) -> tuple[_Bucket, int]:
        """Count `amount` from now on."""
        self.used(now)
        if not self._buckets or now >= self._buckets[-1].first + self._grain:
            self._buckets.append(_Bucket(now))
        bucket = self._buckets[-1]
        bucket.last = now
        bucket.amount += amount
        self._total += amount
        return bucket, amount

    def commit(self, part: tuple[_Bucket, int], used: int, now: float) -> None:
        """Count what was used: less where it was reserved, more from now on."""
        bucket, reserved = part
        self.used(now)
        if used > reserved:
            self.reserve(used - reserved, now)
        elif bucket.last > now - self._seconds:
            bucket.amount -= reserved - used
            self._total -= reserved - used

    def __len__(self) -> int:
        return len(self._buckets)


class InFlight:
    """What runs now."""

    __slots__ = ("__weakref__", "_running")

    def __init__(self) -> None:
        self._running = 0

    def used(self, now: float) -> int:  # noqa: ARG002 - the protocol's
        """What runs now."""
        return self._running

    def wait(self, limit: int, amount: int, now: float) -> float:  # noqa: ARG002 - the protocol's
        """0, or infinite: nothing says when a request ends."""
        return 0.0 if self._running + amount <= limit else math.inf

    def reset(self, now: float) -> float:  # noqa: ARG002 - the protocol's
        """0, or infinite."""
        return math.inf if self._running else 0.0

    def reserve(self, amount: int, now: float) -> int:  # noqa: ARG002 - the protocol's
        """Count a request from its start."""
        self._running += amount
        return amount

    def commit(self, part: int, used: int, now: float) -> None:  # noqa: ARG002 - the protocol's
        """Count it no longer, whatever it used."""
        self._running -= part


class Budget:
    """A total for good: what the store knows to be used, and what running requests have reserved on any server."""

    __slots__ = ("__weakref__", "_reserved_in", "_usage", "scope")

    def __init__(self, usage: BudgetUsage, scope: str, reserved_in: str | None = None) -> None:
        """`scope` is what usage is counted under, and reservations where not `reserved_in`."""
        self._usage = usage
        self.scope = scope
        self._reserved_in = reserved_in or scope

    def used(self, now: float) -> int:  # noqa: ARG002 - the protocol's
        """What is used or reserved; raises `Unavailable` before the store was read."""
        committed = self._usage.committed(self.scope)
        if committed is None:
            raise Unavailable(
                "The used tokens have not been read from the database yet. Try again.", code="budget_unknown"
            )
        return committed + self._usage.reserved(self._reserved_in)

    def wait(self, limit: int, amount: int, now: float) -> float:
        """0, or infinite: time gives nothing back. Raises `Unavailable` while what is used cannot be written."""
        if self._usage.unwritable():
            raise Unavailable(
                "What is used of budgets has not been written to the database for a minute. Try again later.",
                code="budget_unwritten",
            )
        return 0.0 if self.used(now) + amount <= limit else math.inf

    def reset(self, now: float) -> float:
        """0, or infinite."""
        return math.inf if self.used(now) else 0.0

    def reserve(self, amount: int, now: float) -> int:  # noqa: ARG002 - the protocol's
        """Keep `amount` of what is left."""
        self._usage.reserve(self._reserved_in, amount)
        return amount

    def commit(self, part: int, used: int, now: float) -> None:  # noqa: ARG002 - the protocol's
        """Take what was used for good, and give the rest back."""
        self._usage.commit(self.scope, used, self._reserved_in, part)


class PeriodBudget:
    """A budget of each day or month in UTC, which begins anew with the next. Only it reads a clock of the world's time.

    What runs while a period ends is reserved in the next as well, and counts where it ends.
    """

    __slots__ = ("__weakref__", "_budget", "_clock", "_kind", "_period", "_scope")

    def __init__(self, usage: BudgetUsage, scope: str, kind: PeriodKind, clock: Callable[[], float]) -> None:
        """`clock` gives Unix seconds."""
        self._budget = Budget(usage, scope, in_period(scope, kind))
        self._scope = scope
        self._kind: PeriodKind = kind
        self._clock = clock
        self._period = Period("", kind, 0, 0)

    def _left(self) -> float:
        """Seconds until the period ends that is now."""
        now = self._clock()
        if not self._period.start <= now < self._period.end:
            self._period = Period.at(self._kind, now)
            self._budget.scope = in_period(self._scope, self._period.name)
        return self._period.end - now

    def used(self, now: float) -> int:
        """What is used in this period, or reserved."""
        self._left()
        return self._budget.used(now)

    def wait(self, limit: int, amount: int, now: float) -> float:
        """Seconds until the next period begins, if `amount` could ever fit."""
        left = self._left()
        if amount > limit:
            return math.inf
        return left if self._budget.wait(limit, amount, now) else 0.0

    def reset(self, now: float) -> float:
        """Seconds until the next period begins, if anything is in use."""
        left = self._left()
        return left if self._budget.used(now) else 0.0

    def reserve(self, amount: int, now: float) -> int:
        """Keep `amount` of what is left."""
        return self._budget.reserve(amount, now)

    def commit(self, part: int, used: int, now: float) -> None:
        """Count what was used in the period that is now."""
        self._left()
        self._budget.commit(part, used, now)
