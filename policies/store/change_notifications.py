"""PostgreSQL notifications of policy changes. Only a shortcut: a server that misses one still polls."""

from __future__ import annotations

import logging
import time
from typing import Any, Final

from sqlalchemy import Connection, Engine, func, select

CHANNEL: Final = "flexgate_policy"

logger = logging.getLogger(__name__)


def notify(connection: Connection) -> None:
    """Notify listening servers once the transaction is committed."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_notify(CHANNEL, "")))


class ChangeNotifications:
    """Listens on a connection of its own, which is made again when it breaks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: Connection | None = None

    def wait(self, seconds: float) -> None:
        """Block until a notification comes, or for `seconds`; never fails, and may miss notifications.

        Making the connection again may take as long as the engine's connection time limit.
        """
        began = time.monotonic()
        if self._engine.dialect.name == "postgresql":
            try:
                if any(True for _ in self._driver().notifies(timeout=seconds, stop_after=1)):
                    return
            except Exception as error:  # whatever it is, who polls must not end
                logger.warning(
                    "no change notifications from the database, which is polled meanwhile: %s", type(error).__name__
                )
                self.close()
        time.sleep(max(0.0, began + seconds - time.monotonic()))

    def close(self) -> None:
        """Give the connection up."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.invalidate()
            connection.close()

    def _driver(self) -> Any:
        if self._connection is None:
            connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            connection.exec_driver_sql(f"LISTEN {CHANNEL}")
            self._connection = connection
        return self._connection.connection.driver_connection
