"""Start a server in the right order: what can be refused without vLLM does not wait for vLLM to load.

The address is bound first, so that a taken port fails at once; it is listened on last, so that
nothing answers before the engine has proved itself.
"""

from __future__ import annotations

import fcntl
import gc
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from flexgate.experts.checkpoint.ownership import Ownership
from flexgate.experts.package.signature import TrustedKeys
from flexgate.policies.errors import StoreUnavailable
from flexgate.policies.store.demo import DEMO_KEYS
from flexgate.policies.store.identity import FileIdentity
from flexgate.policies.store.store import Store
from flexgate.server.engine.frontend.checkpoint import require_unchanged
from flexgate.server.engine.frontend.launch import EngineSettings, launch, plan
from flexgate.server.engine.protocol.clock import Clock
from flexgate.server.experts.restore import AtStart, at_start, require_ranks
from flexgate.server.experts.versions import merged_versions, with_packages
from flexgate.server.inference.limits.interrupted import count_interrupted
from flexgate.server.ledger.journal import NAME, Journal
from flexgate.server.lifecycle import seed
from flexgate.server.lifecycle.console import Started
from flexgate.server.lifecycle.receipts import kept_receipts
from flexgate.server.lifecycle.settings import Settings
from flexgate.server.lifecycle.store_settings import SettingsError
from flexgate.server.policy.rollback_guard import RollbackGuard, require_clock

if TYPE_CHECKING:
    from flexgate.server.http.tracing import Tracing

Stage = Callable[[str, int, int], None]
Ready = Callable[[Started], None]


async def serve(settings: Settings, model: Path, *, stage: Stage, ready: Ready) -> None:
    """Serve until a signal comes.

    Args:
        model: the checkpoint's directory.
        stage: told what is happening at start.
        ready: told what was started, once all is well.

    Raises:
        Exception: whatever stops the start; nothing was listening then.
    """
    clock = Clock()  # one for all, from before the first look at it: a step back while the engine starts is seen
    engine_settings = _engine_settings(settings, model)
    checkpoint = plan(engine_settings).checkpoint
    _require_tokenizer(model)
    keys = trusted_keys(settings)
    with (
        _bound(settings.host, settings.port) as sock,
        _bound_admin(settings) as admin,
        _alone(settings.directory()) as directory,
        _store(settings) as store,
        kept_receipts(settings, store, clock) as receipts,
        _ledger(settings, clock) as ledger,
        _events(settings, ledger),
        _tracing(settings) as tracing,
        ExitStack() as after_engine,
    ):
        ledger.retention.until(lambda: receipts.maker.sequence)
        _migrate(store, settings.database())
        rollback_guard = _rollback_guard(settings)
        rollback_guard.require(store)
        require_clock(store, clock())
        merged = merged_versions(model, [expert.id for expert in checkpoint.experts])
        before = at_start(store, checkpoint.experts, merged)
        engine_settings = replace(
            engine_settings, revoked=before.without, least_slots=before.least_slots, weights_epoch=before.epoch
        )
        planned = plan(engine_settings)
        require_ranks(before, planned.table.map.rank_of)
        _prepare(settings, store, before, checkpoint.ownership, at=clock())
        counted = count_interrupted(store, ledger, clock)
        with _interruptible():
            launching = launch(engine_settings, stage, clock=clock)
            engine = await launching.__aenter__()
        try:
            with _interruptible():
                from flexgate.server.lifecycle.container import build_services
                from flexgate.server.lifecycle.serve import run

                services = build_services(
                    settings,
                    model,
                    engine,
                    store,
                    ledger,
                    receipts,
                    rollback_guard,
                    directory,
                    merged,
                    keys,
                    clock,
                    tracing,
                )
                if not counted:
                    services.budget_usage.later = partial(count_interrupted, store, ledger, clock, serving=True)
                after_engine.callback(services.budget_usage.close)  # once no request has anything left to commit
                engine.client.publish(with_packages(model, engine.client.experts()), engine.client.weights_epoch)
                require_unchanged(checkpoint)
                await services.experts.restore(stage)
            secret = None if settings.demo else seed.first_admin_key(store, at=clock())
            services.policy.confirm()
            services.budget_usage.refresh()
            receipts.maker.start()
            _settle_heap()
            admin_url = None if admin is None else _url(admin)
            hint = _hint(_url(sock)) if settings.demo else None
            traces = None if tracing is None else tracing.endpoint
            ready(Started(planned, engine.client, _url(sock), admin_url, secret, hint, before.set_aside, traces))
            await run(settings, services, sock, admin)
        finally:
            await launching.__aexit__(None, None, None)


def _settle_heap() -> None:
    """Spare the collector what lives until the end: looking through it would halt every request for a while."""
    gc.collect()
    gc.freeze()


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    with sock:
        yield sock


@contextmanager
def _bound_admin(settings: Settings) -> Iterator[socket.socket | None]:
    if settings.admin_port is None:
        yield None
        return
    with _bound("127.0.0.1", settings.admin_port) as sock:
        yield sock


@contextmanager
def _alone(directory: Path) -> Iterator[FileIdentity]:
    """Hold the directory's lock, because a server removes copies that its store does not name; yields the lock file."""
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SettingsError(
                f"another server uses the state directory {directory}: stop it, or give this one another --state-dir"
            ) from error
        file = FileIdentity(directory / "lock", "the lock of the state directory")
        file.take()
        yield file


@contextmanager
def _store(settings: Settings) -> Iterator[Store]:
    store = Store.open(settings.database())
    try:
        yield store
    finally:
        store.close()


@contextmanager
def _ledger(settings: Settings, clock: Callable[[], float]) -> Iterator[Journal]:
    """The journal of this server's usage; what the server was serving when it last ended is settled first."""
    from flexgate.server.http.usage_metrics import USAGE

    journal = Journal(settings.directory() / NAME, clock=clock, count=USAGE.count)
    try:
        yield journal
    finally:
        journal.close()


@contextmanager
def _events(settings: Settings, ledger: Journal) -> Iterator[None]:
    """What sends the ledger's requests on, where the operator asks for it."""
    if settings.usage_events is None:
        yield
        return
    from flexgate.server.http import metrics
    from flexgate.server.ledger.events import Exporter, sink_of

    token = settings.usage_events_token
    sink = sink_of(settings.usage_events, None if token is None else token.read_text().strip())
    exporter = Exporter(ledger.path, sink, settings.directory(), count=metrics.count_events)
    ledger.retention.until(lambda: exporter.sent, "events")
    exporter.start()
    try:
        yield
    finally:
        exporter.stop()


@contextmanager
def _tracing(settings: Settings) -> Iterator[Tracing | None]:
    """What sends spans of requests, where the operator asks for it; it reads variables that the engine must not see."""
    from flexgate.server.http import metrics
    from flexgate.server.http.tracing import endpoint_of, tracing_to

    endpoint = endpoint_of(settings.otlp_endpoint)
    if endpoint is None:
        yield None
        return
    tracing = tracing_to(endpoint, metrics.count_spans)
    tracing.start()
    try:
        yield tracing
    finally:
        tracing.close()


def _migrate(store: Store, url: str) -> None:
    """Bring the policy database up to date; what stands against it names the database, without a password."""
    from sqlalchemy import make_url

    try:
        store.migrate()
    except StoreUnavailable as error:
        raise type(error)(f"{error} ({make_url(url)})") from error


@contextmanager
def _interruptible() -> Iterator[None]:
    """While vLLM starts or loads, it holds the event loop: let a signal end the start as an exception."""

    def stop(number: int, _frame: Any) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _prepare(settings: Settings, store: Store, start: AtStart, ownership: Ownership, *, at: float) -> None:
    prepare = seed.prepare_demo if settings.demo else seed.prepare
    public_kept = bool(start.ranks)
    prepare(store, start.resident, epoch=start.epoch, at=at, ownership=ownership, public_kept=public_kept)
    store.snapshot()  # a policy that cannot be read stops the start here, not once the engine is up


def _hint(address: str) -> str:
    """A demo's keys and a first question."""
    *keys, owner, admin = DEMO_KEYS
    question = "Which Tarnholm citizen painted Norbrin Library?"
    body = f'{{"model": "flexgate-demo", "messages": [{{"role": "user", "content": "{question}"}}]}}'
    return (
        f"keys: {', '.join(keys)}; {owner} is the key of the owner of 'legal'; {admin} administers\n"
        f"try:  curl {address}/v1/chat/completions -H 'Authorization: Bearer {keys[0]}' "
        f"-H 'Content-Type: application/json' -d '{body}'"
    )


def _rollback_guard(settings: Settings) -> RollbackGuard:
    return RollbackGuard(settings.directory() / "policy.json")


def _engine_settings(settings: Settings, model: Path) -> EngineSettings:
    return EngineSettings(
        model=model,
        max_experts=settings.max_experts,
        free_slots=settings.slot_kinds.full,
        low_ranks=settings.slot_kinds.ranks,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        kv_cache_memory_bytes=settings.kv_cache_memory_bytes,
        enforce_eager=settings.enforce_eager or settings.demo,
        tensor_parallel_size=settings.tensor_parallel_size,
        enable_expert_parallel=settings.enable_expert_parallel,
        moe_kernels=settings.moe_kernels,
        shutdown_timeout=settings.drain_seconds,
    )


def _require_tokenizer(model: Path) -> None:
    if not (model / "tokenizer_config.json").is_file():
        raise SettingsError(f"{model} has no tokenizer: tokenizer_config.json is missing")


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def trusted_keys(settings: Settings) -> TrustedKeys | None:
    """Whose packages may be added: None asks for no signature; without a folder of keys nobody is trusted.

    Raises:
        KeyInvalid: a file in the folder is no public key.
    """
    if settings.demo or settings.allow_unsigned_experts:
        return None
    if settings.trusted_keys is None:
        return TrustedKeys({})
    return TrustedKeys.from_directory(settings.trusted_keys)
