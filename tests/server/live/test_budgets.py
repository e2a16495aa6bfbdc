"""Whatever ends a server, budgets have what its ledger has."""

from __future__ import annotations

import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import live_server
import psutil
import pytest

from flexgate.policies.documents import Tenant
from flexgate.policies.store import Store, budgets

pytestmark = [pytest.mark.engine, pytest.mark.slow]
LONG = {"prompt": "the", "max_tokens": 900, "ignore_eos": True, "stream": True}


def test_what_a_kill_or_a_stop_cuts_off_is_in_budgets_as_in_the_ledger(text_checkpoint: Path, tmp_path: Path) -> None:
    with closing(_seeded(text_checkpoint, tmp_path)) as store:
        with _streaming(text_checkpoint, tmp_path) as killed:
            family = live_server.family(killed)
            for process in (killed.process, *family):
                process.send_signal(signal.SIGKILL)
        killed.process.wait(60)
        psutil.wait_procs(family, timeout=10)
        assert _billed(tmp_path) == 0
        with _streaming(text_checkpoint, tmp_path) as stopped:
            interrupted = _billed(tmp_path)
            assert budgets.read_use(store.engine).used == {"proj_all": interrupted}
            assert interrupted > 0
            stopped.process.send_signal(signal.SIGTERM)
            assert stopped.process.wait(60) == 0
        assert budgets.read_use(store.engine) == ({"proj_all": _billed(tmp_path)}, {}, frozenset(), frozenset())
        assert _billed(tmp_path) > interrupted


def _seeded(model: Path, directory: Path) -> Store:
    """The policy database, in which the project has a budget."""
    url = f"sqlite:///{directory / 'flexgate.db'}"
    live_server.seed_store(url, live_server.experts_of(model))
    store = Store.open(url)
    with store.change(actor="test", at=time.time()) as change:
        change.put(Tenant.model_validate(live_server.TENANTS["all"] | {"quota": {"total_tokens": 10_000}}))
    return store


@contextmanager
def _streaming(model: Path, directory: Path) -> Iterator[live_server.LiveServer]:
    """A server that lets no request finish when it is stopped, and that has begun to send a long response."""
    running = live_server.start(model, directory, "--drain-seconds=0")
    try:
        with running.client() as http, http.stream("POST", "/v1/completions", json=LONG) as response:
            assert next(response.iter_lines()).startswith("data: ")
            yield running
    finally:
        if running.process.poll() is None:
            live_server.stop(running)


def _billed(directory: Path) -> int:
    """Tokens in the ledger."""
    (ledger,) = directory.glob("*/ledger.db")
    with closing(sqlite3.connect(ledger)) as connection:
        (tokens,) = connection.execute("SELECT sum(prompt_tokens + completion_tokens) FROM usage").fetchone()
    return int(tokens or 0)
