"""Copy a server's usage to the database that it shares with others; its own ledger stays the truth."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from sqlalchemy import Engine

from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.journal import Journal
from flexgate.server.ledger.shared import Shared

EVERY_S: Final = 1.0

logger = logging.getLogger(__name__)


class Copies:
    """Copies one ledger; `run` does so for ever."""

    def __init__(self, journal: Journal, shared: Shared) -> None:
        self._journal = journal
        self.shared = shared
        self._failing = False
        self.sequence = 0  # up to which the database has it, as far as it is known

    @classmethod
    def of(cls, journal: Journal, engine: Engine) -> Copies | None:
        """For a server whose policy database is PostgreSQL; others keep their usage alone."""
        return cls(journal, Shared(engine)) if engine.dialect.name == "postgresql" else None

    def copy(self) -> bool:
        """Copy what is new; whether there may be more. A database that fails is asked again the next time. Blocks."""
        try:
            sequence, more = self.shared.copy(self._journal.path)
        except LedgerError as error:
            if not self._failing:
                logger.error("usage is not copied, and waits in the ledger: %s", error)
            self._failing = True
            return False
        if self._failing:
            logger.warning("usage is copied again")
        self._failing = False
        self.sequence = sequence
        return more

    async def run(self) -> None:
        """Copy every second, and at once where more waits."""
        while True:
            if not await asyncio.to_thread(self.copy):
                await asyncio.sleep(EVERY_S)
