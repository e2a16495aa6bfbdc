"""The server's HTTP side as a process of its own, with everything real but the engine.

`python app_process.py DATABASE_URL PORT EXPERT…`
"""

from __future__ import annotations

import asyncio
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.entrypoints.openai.completion.protocol import CompletionResponse, CompletionResponseChoice
from vllm.entrypoints.serve.engine.protocol import UsageInfo

from flexgate.policies.store import Store
from flexgate.policies.store.change_notifications import ChangeNotifications
from flexgate.server.engine.frontend.calls import ExpertInfo
from flexgate.server.engine.protocol.slots import SlotMap
from flexgate.server.inference.fair_queue import FairQueue
from flexgate.server.ledger.journal import Journal
from flexgate.server.ledger.receipts.book import Book
from flexgate.server.ledger.receipts.maker import Maker
from flexgate.server.ledger.receipts.service import Receipts
from flexgate.server.ledger.receipts.signing import KeyFile
from flexgate.server.lifecycle.serve import run
from flexgate.server.lifecycle.services import Services
from flexgate.server.lifecycle.settings import Settings
from flexgate.server.policy.replicas import Replicas
from flexgate.server.policy.source import PolicySource


async def _complete(request: Any, raw_request: Any = None) -> Any:
    return CompletionResponse(model="tiny", choices=[CompletionResponseChoice(index=0, text="x")], usage=UsageInfo())


def _pseudonym(owner: str, tenant: str) -> str:
    return f"{owner}-{tenant}"


async def _follow(*_: Any) -> None:
    """No experts are added to this process."""
    await asyncio.Event().wait()


def _services(settings: Settings, store: Store, experts: list[str]) -> Services:
    infos = tuple(ExpertInfo(id_, "", "", slot, 1, True) for slot, id_ in enumerate(experts))
    client: Any = SimpleNamespace(
        weights_epoch=1,
        errored=False,
        ungated={},
        ready=lambda: True,
        begin=lambda call: None,
        stop=lambda call, reason: setattr(call, "failed", reason),
        end_at=lambda call, valid_until, reason: call.end_at(valid_until, reason),
        end=lambda call: None,
        experts=lambda: infos,
        refs={info.id: info.ref for info in infos},
        gates={},
        slot_map=SlotMap(len(infos), (bytes(range(len(infos))),)),
    )
    handlers: Any = SimpleNamespace(completion=SimpleNamespace(create_completion=_complete))
    policy = PolicySource(
        store,
        lambda: dict.fromkeys(experts, 1),
        lease_s=settings.policy_lease_seconds,
        poll_s=settings.policy_poll_seconds,
        replicas=Replicas(store.engine, lease_s=settings.policy_lease_seconds),
        notifications=ChangeNotifications(store.engine),
    )
    policy.confirm()
    nothing: Any = SimpleNamespace(follow=_follow)
    folder = Path(tempfile.mkdtemp())
    maker = Maker(
        folder / "ledger.db",
        Book(folder / "receipts.db"),
        KeyFile(folder / "receipts.pem"),
        clock=time.time,
        policy_digest=lambda _: "0" * 64,
        pseudonym=_pseudonym,
    )
    return Services(
        queue=FairQueue(64, share=0.5, most_queued=1024, seconds=300),
        client=client,
        handlers=handlers,
        policy=policy,
        store=store,
        ledger=Journal(folder / "ledger.db", clock=time.time),
        receipts=Receipts(folder / "ledger.db", folder / "receipts.db", maker, _pseudonym),
        experts=nothing,
        uploads=nothing,
        model_names=("tiny",),
        started=time.time(),
    )


def main(database_url: str, port: str, *experts: str) -> None:
    """Serve until a signal comes."""
    settings = Settings(model=Path("none"), port=int(port))
    store = Store.open(database_url)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", int(port)))
        asyncio.run(run(settings, _services(settings, store, list(experts)), sock))


if __name__ == "__main__":
    main(*sys.argv[1:])
