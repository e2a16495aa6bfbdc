"""Connections: SQLite and PostgreSQL set up alike, and driver errors turned into ours.

Writers take turns, so that policy versions are committed in their order: SQLite by `BEGIN
IMMEDIATE`, PostgreSQL by one advisory lock. Nothing waits for ever: not for a lock, and not for a
PostgreSQL server that does not answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy import URL, Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from flexgate.policies.errors import StoreDamaged, StoreUnavailable
from flexgate.policies.store.identity import FileIdentity
from flexgate.policies.store.reserve import Reserve
from flexgate.policies.strict_json import no_key_twice

BUSY_TIMEOUT_MS: Final = 5_000
ANSWER_TIMEOUT_S: Final = 2
KEEPALIVE: Final = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
"""A host that is gone is noticed while a connection waits, too, within 25 seconds."""
PUT_BACK: Final = "restore a backup of the database"
_WRITE_LOCK: Final = 0x666C6578
_files: Final[WeakKeyDictionary[Engine, FileIdentity]] = WeakKeyDictionary()
_reserves: Final[WeakKeyDictionary[Engine, Reserve]] = WeakKeyDictionary()


def open_engine(url: str) -> Engine:
    """An engine for `url`; connects lazily. Raises `StoreUnavailable` for a URL it cannot use."""
    try:
        parsed = make_url(url)
        require_plain_file(parsed)
        engine = create_engine(
            parsed, pool_pre_ping=True, connect_args=_connect_args(parsed), json_deserializer=_from_json
        )
    except (ArgumentError, ImportError, ValueError) as error:
        raise StoreUnavailable(f"the store's URL cannot be used: {error}") from error
    if parsed.get_backend_name() == "postgresql":
        event.listen(engine, "do_connect", _connect)
    if parsed.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        if parsed.database and parsed.database != ":memory:":
            _watch_file(engine, FileIdentity(Path(parsed.database), "the database"))
            _reserves[engine] = Reserve(Path(parsed.database))
    return engine


def require_plain_file(url: URL) -> None:
    """Raise `ValueError` for a SQLite URI (`file:…`): the file behind it could not be compared with its name."""
    if url.get_backend_name() == "sqlite" and ("uri" in url.query or (url.database or "").lower().startswith("file:")):
        raise ValueError("SQLite's 'file:' URIs are not used: write the path of the file itself")


def _watch_file(engine: Engine, file: FileIdentity) -> None:
    """Refuse every transaction, and every new connection, once the path names another file."""
    _files[engine] = file
    event.listen(engine, "do_connect", lambda *_: file.require())
    event.listen(engine, "connect", lambda *_: file.take())
    event.listen(engine, "begin", lambda _: file.require(), insert=True)


def _require_kept(engine: Engine) -> None:
    """Raise `StoreReplaced` if what was committed just now may have gone into a file without a name."""
    file = _files.get(engine)
    if file is not None:
        file.require()


def _from_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=no_key_twice)


def _connect_args(url: URL) -> dict[str, int]:
    if url.get_backend_name() != "postgresql":
        return {}
    return {"connect_timeout": ANSWER_TIMEOUT_S, "tcp_user_timeout": ANSWER_TIMEOUT_S * 1000, **KEEPALIVE}


def _connect(_dialect: object, _record: object, args: list[Any], arguments: dict[str, Any]) -> Any:
    from flexgate.policies.store.postgres import connect  # what has SQLite alone does without its driver

    return connect(*args, **arguments)


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout = {BUSY_TIMEOUT_MS}",
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("flexgate_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def unhurried(connection: Connection) -> Iterator[None]:
    """Let statements take as long as they take: a migration of large tables."""
    if connection.dialect.name != "postgresql":
        yield
        return
    driver: Any = connection.connection.driver_connection
    with driver.within(math.inf):
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        yield


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A connection that sees one consistent state."""
    with _translated(), engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection = connection.execution_options(isolation_level="REPEATABLE READ")
        with connection.begin():
            yield connection


def require_room(engine: Engine) -> None:
    """Raise `StoreFull` unless the disk has room for more than what takes rights away."""
    if engine in _reserves:
        _reserves[engine].require_room()


def _keep_reserve(engine: Engine) -> None:
    if engine in _reserves:
        _reserves[engine].keep()


@contextmanager
def writing(engine: Engine, *, urgent: bool = False, alone: bool = True) -> Iterator[Connection]:
    """A connection inside one transaction, alone among writers; commits if nothing is raised.

    What is `urgent` may use the disk space that is kept for taking rights away; else raises `StoreFull` without room.
    What changes no policy need not be `alone` on PostgreSQL, so that a revocation never waits for it.
    """
    if not urgent:
        require_room(engine)
    with _translated(), engine.connect() as connection:
        connection = connection.execution_options(flexgate_writes=True)
        with connection.begin():
            if engine.dialect.name == "postgresql":
                connection.execute(text(f"SET LOCAL lock_timeout = {BUSY_TIMEOUT_MS}"))
                if alone:
                    connection.execute(text(f"SELECT pg_advisory_xact_lock({_WRITE_LOCK})"))
            yield connection
        _require_kept(engine)
    _keep_reserve(engine)


@contextmanager
def noting(engine: Engine) -> Iterator[Connection]:
    """A transaction for rows that only their own process writes: PostgreSQL does not queue it."""
    with _translated(), engine.connect() as connection:
        connection = connection.execution_options(flexgate_writes=True)
        with connection.begin():
            yield connection
        _require_kept(engine)
    _keep_reserve(engine)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        raise StoreUnavailable(f"the store cannot be used: {error.orig}") from error
    except json.JSONDecodeError as error:
        raise StoreDamaged(f"a stored document cannot be read as JSON ({error.msg}): {PUT_BACK}") from error
    except SQLAlchemyError as error:
        raise StoreUnavailable(f"the store cannot be used: {error}") from error
