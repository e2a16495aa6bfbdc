"""One real server for the whole test session: `flexgate serve` as a process of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from demo_server import free_port as free_port
from transcripts import Terminal

from flexgate.policies.agreements import Agreement
from flexgate.policies.documents import Expert, Role, Tenant
from flexgate.policies.store.store import Store

READY_SECONDS = 240
KEYS = {
    "all": "sk-test-all",
    "press": "sk-test-press",
    "public": "sk-test-public",
    "free": "sk-test-free",
    "admin": "sk-test-admin",
    "auditor": "sk-test-auditor",
    "owner": "sk-test-owner",
    "revoked": "sk-test-revoked",
    "expired": "sk-test-expired",
}
TENANTS = {
    "all": {"id": "proj_all", "name": "all", "mode": "deny_list", "listed": ["secret"]},
    "press": {"id": "proj_press", "name": "press", "expert_ids": ["news"]},
    "public": {"id": "proj_public", "name": "public"},
    "free": {"id": "proj_free", "name": "free", "mode": "deny_list", "anchor_optional": True},
}
OPTIONS = (
    "--enforce-eager",
    "--dtype=float32",
    "--kv-cache-memory-bytes=67108864",
    "--served-model-name=tiny",
    "--served-model-name=alias",
)


@dataclass
class LiveServer:
    """A running server and where its traces are."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    database: Path

    def key(self, name: str) -> str:
        """A key of the seeded store."""
        return KEYS[name]

    def client(self, name: str = "all") -> httpx.Client:
        """An HTTP client with a key."""
        headers = {"authorization": f"Bearer {KEYS[name]}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)


def seed_store(database_url: str, experts: dict[str, tuple[str, str]]) -> None:
    """Tenants of every kind; `secret` is hidden from all but one."""
    store = Store.open(database_url)
    store.migrate()
    now = time.time()
    with store.change(actor="test", at=now - 100) as change:
        for id_, (owner, domain) in experts.items():
            hidden = "hidden" if id_ == "secret" else "listed"
            change.put(Expert(id=id_, owner=owner, domain=domain, visibility=hidden))
            if id_ != "public":
                terms = {"id": f"a-{id_}", "owner": owner, "experts": [id_]}
                rest = {"assignee": "everyone", "effect": "permit"}
                change.put(Agreement.model_validate(terms | rest))
        for name, values in TENANTS.items():
            tenant = Tenant.model_validate(values)
            change.put(tenant)
            _add_key(change, name, Role.TENANT, tenant_id=tenant.id)
        _add_key(change, "admin", Role.ADMIN)
        _add_key(change, "auditor", Role.AUDITOR)
        _add_key(change, "owner", Role.OWNER, owner_id="gazette")
        _add_key(change, "expired", Role.TENANT, tenant_id="proj_all", expires=now - 1)
        revoked = _add_key(change, "revoked", Role.TENANT, tenant_id="proj_all")
    with store.change(actor="test", at=now - 50) as change:
        change.revoke_key(revoked)
    store.close()


def start(
    model: Path,
    directory: Path,
    *options: str,
    database_url: str | None = None,
    log: Path | None = None,
    terminal: bool = False,
) -> LiveServer:
    """Start a server, on a terminal if asked, and wait until it is ready; a database that is given has been seeded."""
    database = directory / "flexgate.db"
    if database_url is None:
        database_url = f"sqlite:///{database}"
        if not database.exists():
            seed_store(database_url, experts_of(model))
    port = free_port()
    log = log or directory / "server.log"
    command = [_script(), "serve", str(model), f"--port={port}", *OPTIONS, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    if terminal:  # its width is the terminal's, whatever runs the tests
        environment = {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES")}
        environment["TERM"] = "xterm"
    with _output(log, terminal=terminal) as output:
        process = subprocess.Popen(
            [*command, f"--database-url={database_url}", f"--state-dir={directory}"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            cwd=directory,
        )
    server = LiveServer(f"http://127.0.0.1:{port}", process, log, database)
    _await_ready(server)
    return server


@contextmanager
def _output(log: Path, *, terminal: bool) -> Iterator[int]:
    if not terminal:
        with log.open("wb") as file:
            yield file.fileno()
        return
    shown = Terminal(log)
    try:
        yield shown.slave
    finally:
        shown.close()


def stop(server: LiveServer, *, seconds: float = 60) -> int:
    """End a server as an operator does, or else kill it; returns its exit status."""
    server.process.send_signal(signal.SIGTERM)
    try:
        return server.process.wait(seconds)
    except subprocess.TimeoutExpired:
        server.process.kill()
        raise


def family(server: LiveServer) -> list[psutil.Process]:
    """The server's processes below it."""
    return psutil.Process(server.process.pid).children(recursive=True)


def _await_ready(server: LiveServer) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        try:
            if httpx.get(f"{server.url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    server.process.kill()
    raise RuntimeError("the server did not start:\n" + server.log.read_text()[-4000:])


def _add_key(change, name, role, **values):  # type: ignore[no-untyped-def]
    return change.add_key(KEYS[name], prefix=KEYS[name], role=role, **values).key_id


def experts_of(model: Path) -> dict[str, tuple[str, str]]:
    import json

    manifest = json.loads((model / "flexgate.json").read_text())
    return {e["id"]: (e["owner"], e["domain"]) for e in manifest["experts"]}


def _script() -> str:
    return str(Path(sys.executable).with_name("flexgate"))
