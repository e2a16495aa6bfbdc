"""The time that decisions are made by: Unix seconds that never go back while the process runs.

A machine's clock can be set back. What has ended by then, an agreement or a key, would be in force
again; so time goes on from the latest that was seen, at the pace of a clock that cannot be set.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

NOTED_FROM_S: Final = 1.0

logger = logging.getLogger(__name__)


class Clock:
    """Call it for the time. A clock that is set forward is followed; one that is set back is logged, once."""

    def __init__(self, machine: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        """`machine` is in Unix seconds and may go back; `steady` has any beginning and may not."""
        self._machine = machine
        self._steady = steady
        self._lock = threading.Lock()
        self._ahead = machine() - steady()
        self._noted = False

    def __call__(self) -> float:
        """Unix seconds."""
        with self._lock:
            steady = self._steady()
            ahead = self._machine() - steady
            self._note(self._ahead - ahead)
            self._ahead = max(self._ahead, ahead)
            return steady + self._ahead

    def _note(self, back: float) -> None:
        noted, self._noted = self._noted, back > NOTED_FROM_S
        if self._noted and not noted:
            logger.error(
                "the machine's clock went back by %.0f seconds: what has expired stays expired; set it right, or "
                "restart the server to use the new time",
                back,
            )
