"""Usage of several servers in one PostgreSQL, each request once."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from postgreskit import PostgresServer, find, running

from flexgate.policies.store.database import open_engine
from flexgate.server.ledger import retention, shared
from flexgate.server.ledger.copies import Copies
from flexgate.server.ledger.entries import COMPLETED, RegisteredExpert, Registration, Used
from flexgate.server.ledger.errors import LedgerError, TooMuchAsked
from flexgate.server.ledger.journal import Journal
from flexgate.server.ledger.log import log_of
from flexgate.server.ledger.reading import Local
from flexgate.server.ledger.shared import PLACE, Shared
from flexgate.server.ledger.usage import Group, Sought, sums

EXPERTS = (RegisteredExpert(0, "public", "commons"), RegisteredExpert(1, "news", "gazette"))


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    if find("postgres") is None and not os.environ.get("CI"):
        pytest.skip("PostgreSQL is not installed")
    with running() as server:
        yield server


@pytest.fixture
def database(postgres: PostgresServer) -> Iterator[str]:
    url = postgres.new_database()
    yield url
    postgres.drop(url)


@pytest.fixture
def engine(database: str) -> Iterator[sa.Engine]:
    engine = open_engine(sa.make_url(database).set(drivername="postgresql+psycopg").render_as_string())
    yield engine
    engine.dispose()


def record(path: Path, names: range, at: float = 9.5) -> None:
    """Requests that a server has recorded and ended."""

    async def run() -> None:
        journal = Journal(path, clock=lambda: at)
        for name in names:
            registration = Registration(f"{path.parent.name}-{name}", 5, "p", "k", "chat", "tiny", 7, 3, EXPERTS)
            entry = journal.register(registration)
            entry.end(COMPLETED, Used(10, 0, name, [10, 0, 10, 0], [name, name, name, name]))
        journal.close()

    asyncio.run(run())


def rows(engine: sa.Engine, query: str) -> list[Any]:
    with engine.connect() as connection:
        connection.execute(sa.text("SET search_path = flexgate_usage"))
        return [tuple(row) for row in connection.execute(sa.text(query))]


def local(path: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    for name in "ab":
        (tmp_path / name).mkdir()
    return [tmp_path / name / "ledger.db" for name in "ab"]


def test_each_request_of_each_server_is_copied_once(engine: sa.Engine, paths: list[Path]) -> None:
    copies = [Shared(engine), Shared(engine)]
    for round_ in range(3):
        for path, copy in zip(paths, copies, strict=True):
            record(path, range(10 * round_, 10 * round_ + 10))
            copy.copy(path)
            copy.copy(path)
    both = [row for path in paths for row in local(path, "SELECT request, outcome, completion_tokens FROM usage")]
    assert sorted(rows(engine, "SELECT request, outcome, completion_tokens FROM usage")) == sorted(both)
    parts = (
        "SELECT request, expert, owner, prompt_mass, completion_mass, share_ppm FROM usage JOIN parts USING (sequence)"
    )
    assert sorted(rows(engine, parts)) == sorted(row for path in paths for row in local(path, parts))
    servers = rows(engine, "SELECT number, sequence FROM servers ORDER BY number")
    assert [sequence for _, sequence in servers] == [
        max(local(path, "SELECT max(sequence) FROM usage"))[0] for path in paths
    ]
    sequences = {sequence >> PLACE for (sequence,) in rows(engine, "SELECT sequence FROM usage")}
    assert sequences == {number for number, _ in servers}


def test_a_copy_that_breaks_off_goes_on_where_it_was(
    engine: sa.Engine, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = paths[0]
    record(path, range(50))
    monkeypatch.setattr(shared, "REQUESTS_AT_ONCE", 20)
    assert Shared(engine).copy(path) == (20, True)
    monkeypatch.setattr(shared, "_trim", broken)
    with pytest.raises(LedgerError, match="cannot be used: connection lost"):
        Shared(engine).copy(path)
    assert rows(engine, "SELECT count(*) FROM usage") == [(20,)]
    monkeypatch.undo()
    monkeypatch.setattr(shared, "REQUESTS_AT_ONCE", 20)
    copy = Shared(engine)
    assert [copy.copy(path) for _ in range(3)] == [(40, True), (50, False), (50, False)]
    assert rows(engine, "SELECT count(*), count(DISTINCT request) FROM usage") == [(50, 50)]


def broken(*_: Any) -> None:
    raise psycopg.OperationalError("connection lost")


def test_a_first_copy_that_breaks_off_is_made_by_the_same_server(
    engine: sa.Engine, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    record(paths[0], range(3))
    copy = Shared(engine)
    with monkeypatch.context() as broken:
        broken.setattr(shared, "_trim", lambda *_: (_ for _ in ()).throw(psycopg.OperationalError("gone")))
        with pytest.raises(LedgerError, match="gone"):
            copy.copy(paths[0])
    assert copy.copy(paths[0]) == (3, False)
    assert len(rows(engine, "SELECT request FROM usage")) == 3


def test_nothing_is_copied_while_the_ledgers_log_is_emptied(
    engine: sa.Engine, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy reads the ledger for as long as the database takes, again and again: it would keep the log from that."""
    record(paths[0], range(3))
    log = log_of(paths[0])
    monkeypatch.setattr(log, "_held_since", 1.0)
    monkeypatch.setattr(shared, "SECONDS", 0.01)
    with pytest.raises(LedgerError, match="is being emptied"):
        Shared(engine).copy(paths[0])
    monkeypatch.undo()
    assert Shared(engine).copy(paths[0]) == (3, False)


def test_an_older_copy_of_a_ledger_is_not_copied(engine: sa.Engine, paths: list[Path], tmp_path: Path) -> None:
    path = paths[0]
    record(path, range(10))
    shutil.copy(path, tmp_path / "backup.db")
    record(path, range(10, 20))
    Shared(engine).copy(path)
    for name in ("ledger.db-wal", "ledger.db-shm"):
        path.with_name(name).unlink(missing_ok=True)
    shutil.copy(tmp_path / "backup.db", path)
    with pytest.raises(LedgerError, match="is an older copy of itself: usage up to number 20"):
        Shared(engine).copy(path)
    record(path, range(20, 40))
    with pytest.raises(LedgerError, match="is an older copy of itself"):
        Shared(engine).copy(path)
    assert rows(engine, "SELECT count(*) FROM usage") == [(20,)]


def test_a_database_that_is_gone_for_a_while_loses_and_doubles_nothing(
    engine: sa.Engine, paths: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record(paths[0], range(5))
    journal = Journal(paths[0], clock=lambda: 9.5)
    copies = Copies(journal, Shared(sa.create_engine(f"postgresql+psycopg://nobody@/none?host={tmp_path}")))
    assert [copies.copy(), copies.copy()] == [False, False]
    assert [record.message for record in caplog.records if "usage is not copied" in record.message] != []
    assert len(caplog.records) == 1
    copies.shared = Shared(engine)
    assert [copies.copy(), copies.copy()] == [False, False]
    assert "usage is copied again" in caplog.text
    assert rows(engine, "SELECT count(*) FROM usage") == [(5,)]
    assert copies.sequence == 5
    journal.close()


@contextmanager
def hanging(postgres: PostgresServer) -> Iterator[None]:
    """The server may be paused in the block, which ends before it answers again by itself."""
    late = threading.Timer(15, postgres.resume)
    late.start()
    try:
        yield
        assert late.is_alive()
    finally:
        late.cancel()
        postgres.resume()


@pytest.mark.parametrize("seen_before", [True, False])
def test_a_database_that_hangs_holds_neither_copies_nor_the_ledgers_log(
    postgres: PostgresServer, engine: sa.Engine, paths: list[Path], monkeypatch: Any, seen_before: bool
) -> None:
    copies = Shared(engine)
    record(paths[0], range(3))
    if seen_before:
        copies.copy(paths[0])
        record(paths[0], range(3, 5))
    with hanging(postgres):
        monkeypatch.setattr(shared, "COPY_SECONDS", 1.0)
        monkeypatch.setattr("flexgate.policies.store.postgres.MOST_SECONDS", 1.0)
        postgres.pause()
        with pytest.raises(LedgerError, match="cannot be used"):
            copies.copy(paths[0])
        with pytest.raises(LedgerError, match="cannot be used"):
            copies.read("SELECT 1", (), seconds=0.1, most=1)
    monkeypatch.undo()
    assert log_of(paths[0].absolute())._open == 0
    assert copies.copy(paths[0])[0] == (5 if seen_before else 3)


def test_what_hangs_in_the_middle_of_a_copy_is_given_up(
    postgres: PostgresServer, engine: sa.Engine, paths: list[Path], monkeypatch: Any
) -> None:
    record(paths[0], range(3))
    copies, trim = Shared(engine), shared._trim
    monkeypatch.setattr(shared, "COPY_SECONDS", 3.0)

    def hangs(*arguments: Any) -> None:
        postgres.pause()
        trim(*arguments)

    monkeypatch.setattr(shared, "_trim", hangs)
    with hanging(postgres), pytest.raises(LedgerError, match="does not answer"):
        copies.copy(paths[0])
    monkeypatch.undo()
    assert copies.copy(paths[0])[0] == 3
    assert rows(engine, "SELECT count(*) FROM usage") == [(3,)]


def test_what_is_deleted_in_the_ledger_is_deleted_in_the_copy(
    engine: sa.Engine, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(retention, "PAUSE_SECONDS", 0.0)
    for path in paths:
        record(path, range(5), at=100 * 86_400)
        record(path, range(5, 8), at=200 * 86_400)
        Shared(engine).copy(path)

    async def run() -> None:
        journal = Journal(paths[0], clock=lambda: 200.0 * 86_400)
        copies = Copies(journal, Shared(engine))
        journal.retention.until(lambda: copies.sequence)
        journal.retention.keep(32)
        async with asyncio.timeout(20):
            while len(local(paths[0], "SELECT * FROM usage")) > 3:
                copies.copy()
                await journal.register(
                    Registration(f"last-{asyncio.get_running_loop().time()}", 5, "p", "k", "c", "t", 7, 3, ())
                ).registered()
        copies.copy()
        journal.close()

    asyncio.run(run())
    left = rows(engine, "SELECT sequence >> 40, count(*) FROM usage WHERE outcome = 'completed' GROUP BY 1 ORDER BY 1")
    assert [count for _, count in left] == [3, 8]
    assert rows(engine, "SELECT count(*) FROM parts WHERE sequence NOT IN (SELECT sequence FROM usage)") == [(0,)]


@pytest.mark.parametrize("groups", [(), ("project_id", "model"), ("expert_id",), ("owner_id", "api_key_id")], ids=str)
def test_sums_over_the_copy_are_those_of_all_ledgers(
    engine: sa.Engine, paths: list[Path], groups: tuple[Group, ...]
) -> None:
    for number, path in enumerate(paths):
        record(path, range(6), at=3600.0 * number)
        record(path, range(6, 9), at=7200.0)
        Shared(engine).copy(path)
    sought = Sought(0, 10_800, 3600, projects=["p"], models=["tiny"], groups=groups)
    both: dict[Any, Counter[str]] = defaultdict(Counter)
    for path in paths:
        for one in sums(Local(path), sought):
            numbers = {name: getattr(one, name) for name in ("prompt_tokens", "completion_tokens", "requests")}
            both[one.start, tuple(one.group.items())].update(numbers)
    found = sums(Shared(engine), sought)
    assert {(one.start, tuple(one.group.items())): one.requests for one in found} == {
        key: numbers["requests"] for key, numbers in both.items()
    }
    for one in found:
        numbers = both[one.start, tuple(one.group.items())]
        assert (one.prompt_tokens, one.completion_tokens) == (numbers["prompt_tokens"], numbers["completion_tokens"])
    assert {type(one.prompt_tokens) for one in found} == {int}


def test_a_query_of_the_copy_is_bounded_in_time(engine: sa.Engine, paths: list[Path]) -> None:
    record(paths[0], range(1))
    Shared(engine).copy(paths[0])
    with pytest.raises(TooMuchAsked, match=r"took longer than 0\.1 seconds"):
        Shared(engine).read("SELECT pg_sleep(20)", (), seconds=0.1, most=1)
    assert Shared(engine).read("SELECT count(*) FROM usage", (), seconds=5.0, most=1) == [(1,)]
    assert Shared(engine).whole_since() == 0
