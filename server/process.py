"""The running server process: start in the right order, drain on a signal, leave no orphan.

The address is bound first, so that a taken port fails at once; it is listened on last, so that
nothing answers before the engine has proved itself. uvicorn's own signal handling would end the
process before the engine's processes are stopped, so it is not used.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import uvicorn
from starlette.types import ASGIApp

from flexgate.policies.store.hints import Hints
from flexgate.policies.store.store import Store
from flexgate.server import tenancy
from flexgate.server.app import build_app, build_listeners
from flexgate.server.clock import Clock
from flexgate.server.engine.client import GatedEngineClient
from flexgate.server.engine.launch import EngineSettings, RunningEngine, launch, plan
from flexgate.server.experts.start import AtStart, at_start, expert_service, uploads
from flexgate.server.experts.versions import Merged, merged_versions
from flexgate.server.openai.handlers import build_handlers
from flexgate.server.openai.limits import Limits
from flexgate.server.past import Past, require_clock
from flexgate.server.peers import Peers
from flexgate.server.policy import PolicySource
from flexgate.server.services import Services
from flexgate.server.settings import Settings, SettingsError
from flexgate.server.startup import Started

Stage = Callable[[str, int, int], None]
Ready = Callable[[Started], None]

logger = logging.getLogger(__name__)


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
    with (
        _bound(settings.host, settings.port) as sock,
        _bound_admin(settings) as admin,
        _alone(settings.directory()),
        _store(settings) as store,
    ):
        store.migrate()
        _past(settings).require(store)
        require_clock(store, clock())
        merged = merged_versions(model, len(checkpoint.experts))
        before = at_start(store, checkpoint.experts, merged)
        engine_settings = replace(
            engine_settings, withdrawn=before.without, least_slots=before.least_slots, weights_epoch=before.epoch
        )
        planned = plan(engine_settings)
        secret = _prepare(settings, store, before, at=clock())
        with _interruptible():
            launching = launch(engine_settings, stage)
            engine = await launching.__aenter__()
        try:
            services = _services(settings, model, engine, store, merged, clock)
            await services.experts.restore(stage)
            services.policy.confirm()
            services.spending.refresh()
            _settle_heap()
            admin_url = None if admin is None else _url(admin)
            ready(Started(planned, engine.client, _url(sock), admin_url, secret, before.set_aside))
            await _run(settings, services, sock, admin)
        finally:
            await launching.__aexit__(None, None, None)


def _settle_heap() -> None:
    """Spare the collector what lives until the end: looking through it would halt every request for a while."""
    gc.collect()
    gc.freeze()


def _services(
    settings: Settings, model: Path, engine: RunningEngine, store: Store, merged: Merged, clock: Clock
) -> Services:
    client = engine.client
    names = settings.served_model_name or (("flexgate-demo",) if settings.demo else (model.name,))
    policy = PolicySource(
        store,
        lambda: {info.id: info.generation for info in client.experts() if info.live},
        lease_s=settings.policy_lease_seconds,
        poll_s=settings.policy_poll_seconds,
        peers=Peers(store.engine, lease_s=settings.policy_lease_seconds),
        hints=Hints(store.engine),
        past=_past(settings),
    )
    handlers = build_handlers(
        client,
        model_names=names,
        chat_template=settings.chat_template,
        tool_call_parser=settings.tool_call_parser,
    )
    return Services(
        client=client,
        handlers=handlers,
        policy=policy,
        store=store,
        experts=expert_service(settings, model, engine, store, policy, merged, clock),
        uploads=uploads(settings),
        experts_dir=settings.experts_dir,
        model_names=names,
        started=clock(),
        clock=clock,
        limits=_limits(settings, client),
        body_bytes=settings.max_body_bytes,
        body_seconds=settings.body_seconds,
    )


def _limits(settings: Settings, client: GatedEngineClient) -> Limits:
    """With the longest text that could fit the model, as vLLM reckons: its longest token, over and over."""
    tokens = int(client.model_config.max_model_len)
    longest = int(client.renderer.tokenizer.max_chars_per_token)
    return replace(settings.limits, prompt_tokens=tokens, prompt_chars=tokens * longest)


async def _run(settings: Settings, services: Services, sock: socket.socket, admin: socket.socket | None = None) -> None:
    listening = [sock]
    app: ASGIApp = build_app(services, hosts=settings.hosts)
    if admin is not None:
        listening.append(admin)
        app = build_listeners(services, admin.getsockname()[:2], hosts=settings.hosts)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=settings.drain_seconds,
        lifespan="off",
    )
    server = _Server(config, services)
    work = (
        services.policy.run(),
        services.denials.run(),
        services.recorded.run(),
        services.spending.run(),
        services.experts.follow(services.policy.withdrawn),
        _stop_with_engine(server, services.client),
    )
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        with server.stopped_by_signals():
            await server.serve(sockets=listening)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        services.denials.close()
        services.recorded.close()
        services.spending.close()
        services.policy.withdraw()
    if services.client.errored:
        raise EngineDied("the engine has died; the log says where")


class EngineDied(Exception):
    """The engine ended by itself; nothing can be served without it."""


class _Server(uvicorn.Server):
    """uvicorn without its signal handling: the first signal drains, the second cuts off."""

    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self._services = services

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Stop on SIGINT and SIGTERM while the block runs."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Take no more requests and finish the running ones; the second time, at once."""
        logger.info("stopping")
        self.force_exit = self._services.draining
        self._services.draining = True
        self.should_exit = True


async def _stop_with_engine(server: _Server, client: GatedEngineClient) -> None:
    while not client.errored:
        await asyncio.sleep(1.0)
    logger.error("the engine has died")
    server.stop()


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
def _alone(directory: Path) -> Iterator[None]:
    """Nobody else keeps its experts there: a server removes copies that its store does not name."""
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SettingsError(
                f"another server keeps its experts in {directory}; give this one a --state-dir of its own"
            ) from error
        yield


@contextmanager
def _store(settings: Settings) -> Iterator[Store]:
    store = Store.open(settings.database())
    try:
        yield store
    finally:
        store.close()


@contextmanager
def _interruptible() -> Iterator[None]:
    """While vLLM starts, it holds the event loop: let a signal end the start as an exception."""

    def stop(number: int, _frame: Any) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _prepare(settings: Settings, store: Store, start: AtStart, *, at: float) -> str | None:
    secret = None
    if settings.demo:
        tenancy.prepare_demo(store, start.resident, epoch=start.epoch, at=at)
    else:
        secret = tenancy.prepare(store, start.resident, epoch=start.epoch, at=at)
    store.snapshot()  # a policy that cannot be read stops the start here, not once the engine is up
    return secret


def _past(settings: Settings) -> Past:
    return Past(settings.directory() / "policy.json")


def _engine_settings(settings: Settings, model: Path) -> EngineSettings:
    return EngineSettings(
        model=model,
        max_experts=settings.max_experts,
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
