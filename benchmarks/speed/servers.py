"""The two servers that are compared, each as its own command starts it, with the same engine options."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from live_server import free_port

from flexgate.experts.checkpoint.ownership import Unit
from flexgate.policies.agreements import Agreement
from flexgate.policies.documents import Role, Tenant
from flexgate.policies.ids import PUBLIC
from flexgate.policies.store.store import Store
from flexgate.server.engine.frontend.checkpoint import read_checkpoint
from flexgate.server.lifecycle.seed import prepare

KEY = "sk-bench"
ADMIN_KEY = "sk-bench-admin"
MODEL = "bench"
READY_SECONDS = 300
FLEXGATE = str(Path(sys.executable).with_name("flexgate"))
VLLM = "vllm.entrypoints.openai.api_server"
SAME = (
    "--enforce-eager",
    "--dtype=bfloat16",
    "--max-num-seqs=64",
    f"--kv-cache-memory-bytes={1 << 30}",
    f"--served-model-name={MODEL}",
)
NOTHING: Mapping[str, str] = {}
# What flexgate sets by itself; vLLM's defaults bind an engine thread to every core.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}


@dataclass(frozen=True)
class Server:
    """A running server, and how long it took to say that it is ready."""

    url: str
    pid: int
    ready_seconds: float


@contextmanager
def flexgate(
    model: Path, directory: Path, *more: str, expected: Sequence[str] = (), environment: Mapping[str, str] = NOTHING
) -> Iterator[Server]:
    """`flexgate serve` with one tenant that may use every expert; `expected` ones are permitted before they come.

    It goes on with the database of an earlier start in the same directory.
    """
    database = f"sqlite:///{directory / 'bench.db'}"
    if not (directory / "bench.db").exists():
        _seed(database, model, expected)
    options = (*SAME, f"--database-url={database}", *more)
    command = (FLEXGATE, "serve", str(model), *options)
    with _running(command, directory / "flexgate.log", "/ready", environment) as server:
        yield server


@contextmanager
def vllm(model: Path, directory: Path) -> Iterator[Server]:
    """vLLM's server as it is: its own model implementation, scheduler and worker.

    By module: the command `vllm serve`, which runs the same, does not start from the package `vllm-cpu`.
    """
    options = (*SAME, "--max-num-batched-tokens=2048", "--distributed-executor-backend=uni")
    with _running(
        (sys.executable, "-m", VLLM, "--model", str(model), *options), directory / "vllm.log", "/health"
    ) as server:
        yield server


@contextmanager
def demo(directory: Path) -> Iterator[Server]:
    """What `make serve` starts, with its state in `directory`."""
    options = ("serve", "--demo", f"--state-dir={directory}")
    with _running((FLEXGATE, *options), directory / "demo.log", "/ready") as server:
        yield server


@contextmanager
def _running(
    command: Sequence[str], log: Path, probe: str, environment: Mapping[str, str] = NOTHING
) -> Iterator[Server]:
    port = free_port()
    began = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host=127.0.0.1", f"--port={port}"],
            stdout=output,
            stderr=output,
            env={**os.environ, **ENVIRONMENT, **environment},
            cwd=log.parent,
        )
    try:
        _await(process, f"http://127.0.0.1:{port}{probe}", log)
        yield Server(f"http://127.0.0.1:{port}", process.pid, time.perf_counter() - began)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()


def _await(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")


def _seed(database: str, model: Path, expected: Sequence[str]) -> None:
    store = Store.open(database)
    now = time.time()
    experts = (*read_checkpoint(model).experts, *(Unit(id_, "unknown", "unknown") for id_ in expected))
    prepare(store, experts, epoch=1, at=now)
    with store.change(actor="bench", at=now) as change:
        for owner in sorted({expert.owner for expert in experts if expert.id != PUBLIC and expert.owner is not None}):
            named = [expert.id for expert in experts if expert.owner == owner and expert.id != PUBLIC]
            terms = {"id": f"all-{owner}", "owner": owner, "experts": named, "assignee": "everyone", "effect": "permit"}
            change.put(Agreement.model_validate(terms))
        tenant = Tenant.model_validate({"id": "proj_bench", "name": "bench", "mode": "deny_list"})
        change.put(tenant)
        change.add_key(KEY, prefix=KEY, role=Role.TENANT, tenant_id=tenant.id)
        change.add_key(ADMIN_KEY, prefix=ADMIN_KEY, role=Role.ADMIN)
    store.close()
