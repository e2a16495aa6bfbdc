"""Serve HTTP until a signal comes or the engine ends; run the background tasks meanwhile.

uvicorn's own signal handling would end the process before the engine's processes are stopped, so it is not used.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from flexgate.server.engine.frontend.client import GatedEngineClient
from flexgate.server.engine.seam.frontend import set_ulimit
from flexgate.server.http.connections import BoundedProtocol
from flexgate.server.lifecycle.app import build_app, build_listeners
from flexgate.server.lifecycle.services import Services
from flexgate.server.lifecycle.settings import Settings

DEMO_TOOL_PARSER: Final = "hermes"
"""So that tool_choice 'auto', which agent frameworks send, is served: calls as JSON between tags."""

logger = logging.getLogger(__name__)


async def run(settings: Settings, services: Services, sock: socket.socket, admin: socket.socket | None = None) -> None:
    """Answer at the bound addresses until a signal comes; raises `EngineDied`."""
    set_ulimit()
    listening = [sock]
    app: ASGIApp = build_app(services, hosts=settings.hosts, origins=settings.cors_origin)
    if admin is not None:
        listening.append(admin)
        app = build_listeners(services, admin.getsockname()[:2], hosts=settings.hosts, origins=settings.cors_origin)
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=settings.drain_seconds,
        lifespan="off",
    )
    server = _Server(config, services)
    work = (
        services.policy.run(),
        services.policy.watch_lease(),
        services.denials.run(),
        services.samples.run(),
        services.budget_usage.run(),
        services.unstored.run(),
        services.retention.run(),
        *(() if services.copies is None else (services.copies.run(),)),
        services.experts.follow(services.policy.revoked),
        _stop_with_engine(server, services.client),
        *(() if services.heads is None else (services.heads.run(),)),
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
        services.samples.close()
        services.policy.deregister()
    if services.client.errored:
        raise EngineDied("the engine has died; the lines before this one name the cause")


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
