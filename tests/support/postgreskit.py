"""A PostgreSQL server of the tests' own: on a socket, as another user if we are root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import sqlalchemy as sa

INSTALLED = "/usr/lib/postgresql/*/bin"
MEMORY = Path("/dev/shm")  # a database is 300 files, which disks take long to make and to remove
ROOM = 1 << 30


def find(program: str) -> str | None:
    """Where a program of PostgreSQL is; Debian keeps them off the PATH."""
    beside = sorted(Path("/").glob(f"{INSTALLED[1:]}/{program}"), reverse=True)
    return shutil.which(program) or (str(beside[0]) if beside else None)


class PostgresServer:
    """A running server. `pause` makes it hang with its connections open, as a stuck disk would."""

    def __init__(self, folder: str, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.url = f"postgresql://postgres@/postgres?host={folder}"

    def new_database(self, like: str | None = None) -> str:
        """The URL of an empty database, or of a copy of one that nothing is connected to."""
        name = f"policy_{uuid.uuid4().hex}"
        copied = f" TEMPLATE {sa.make_url(like).database}" if like else ""
        self._execute(f"CREATE DATABASE {name}{copied}")
        return sa.make_url(self.url).set(database=name).render_as_string(hide_password=False)

    def drop(self, url: str) -> None:
        """Remove a database, also while something is connected to it."""
        self._execute(f"DROP DATABASE {sa.make_url(url).database} WITH (FORCE)")

    def _execute(self, statement: str) -> None:
        engine = sa.create_engine(self.url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sa.text(statement))
        engine.dispose()

    def pause(self) -> None:
        """Stop answering."""
        self._each(psutil.Process.suspend)

    def resume(self) -> None:
        """Answer again."""
        self._each(psutil.Process.resume)

    def _each(self, do: Callable[[psutil.Process], None]) -> None:
        """The server and what serves its connections, which may end at any moment."""
        parent = psutil.Process(self.process.pid)
        for process in (parent, *parent.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                do(process)


@contextmanager
def running(*, durable: bool = False) -> Iterator[PostgresServer]:
    """A server while the block runs; in memory, or on a disk with every commit written to it."""
    user = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}
    place = MEMORY if not durable and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM else None
    with tempfile.TemporaryDirectory(prefix="pg", dir=place, ignore_cleanup_errors=True) as folder:
        if user:
            shutil.chown(folder, **user)
        initdb = [
            str(find("initdb")),
            "-D",
            f"{folder}/data",
            "-U",
            "postgres",
            "-A",
            "trust",
            "--no-sync",
            "-E",
            "UTF8",
        ]
        subprocess.run(initdb, check=True, capture_output=True, cwd=folder, **user)
        options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}"]
        command = [str(find("postgres")), "-D", f"{folder}/data", *([] if durable else ["-F"]), *options]
        process = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL, **user)
        server = PostgresServer(folder, process)
        try:
            _wait_for(server.url)
            yield server
        finally:
            if process.poll() is None:
                server.resume()
                process.send_signal(signal.SIGINT)
                process.wait(timeout=30)


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            with sa.create_engine(url).connect():
                return
        except sa.exc.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
