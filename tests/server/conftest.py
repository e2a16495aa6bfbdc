"""A small policy world and an application without an engine."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import pytest_asyncio
from clocks import Clock

from flexgate.policies.agreements import Agreement
from flexgate.policies.documents import Expert, KeyRecord, Role, Tenant
from flexgate.policies.ids import OwnerId, TenantId
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.store import Store
from flexgate.policies.store.audit import policy_digest
from flexgate.server.http.usage_metrics import USAGE
from flexgate.server.ledger.journal import Journal
from flexgate.server.ledger.receipts.service import Receipts, kept
from flexgate.server.ledger.receipts.signing import KeyFile

EXPERTS = {"public": "commons", "news": "gazette", "math": "academy", "secret": "vault"}
GRADES: dict[str, Any] = {"news": "removed", "math": "router"}


def key(secret: str, role: Role = Role.TENANT, **values: Any) -> KeyRecord:
    """A key record as the store keeps it."""
    digest = hashlib.sha256(secret.encode()).digest()
    fields = {"key_id": f"key_{secret}", "prefix": secret, "created": 0.0} | values
    return KeyRecord(sha256=digest, role=role, **fields)


TENANTS = [
    Tenant(id="t", name="t", expert_ids=frozenset({"news", "secret"})),
    Tenant(id="u", name="u", mode="deny_list"),
]


def agreements() -> list[Agreement]:
    """Everyone may use every expert, as far as their owners are concerned."""
    return [
        Agreement.model_validate(
            {"id": f"a-{id_}", "owner": owner, "experts": [id_], "assignee": "everyone", "effect": "permit"}
        )
        for id_, owner in EXPERTS.items()
        if id_ != "public"
    ]


def build_snapshot(version: int = 7) -> Snapshot:
    """Tenant `t` may use news; math is listed and not allowed; secret is hidden."""
    return Snapshot.build(
        policy_version=version,
        experts=[
            Expert(
                id=id_,
                owner=owner,
                visibility="hidden" if id_ == "secret" else "listed",
                grade=GRADES.get(id_, "unknown"),
            )
            for id_, owner in EXPERTS.items()
        ],
        tenants=TENANTS,
        agreements=agreements(),
        keys=[
            key("sk-t", tenant_id=TenantId("t")),
            key("sk-u", tenant_id=TenantId("u")),
            key("sk-revoked", tenant_id=TenantId("t"), revoked=1.0),
            key("sk-expired", tenant_id=TenantId("t"), expires=1.0),
            key("sk-admin", Role.ADMIN),
            key("sk-auditor", Role.AUDITOR),
            key("sk-owner", Role.OWNER, owner_id=OwnerId("gazette")),
        ],
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def snapshot() -> Snapshot:
    return build_snapshot()


@pytest.fixture
def world() -> tuple[list[Tenant], list[Agreement]]:
    """The tenants and agreements of `snapshot`, to build another one from."""
    return TENANTS, agreements()


class FakeStore:
    """A store whose answers a test sets; an exception is raised instead."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.answer: Snapshot | Exception = snapshot
        self.asked = 0

    def confirm(self, known: Snapshot | None) -> Snapshot:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def store(snapshot: Snapshot) -> FakeStore:
    return FakeStore(snapshot)


class Handler:
    """Stands for vLLM's handlers: keeps what arrives, answers what a test sets."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.calls: list[Any] = []
        self.result: Any = None

    async def __call__(self, request: Any, raw_request: Any = None) -> Any:
        from flexgate.server.engine.frontend.calls import CURRENT_CALL

        assert raw_request is None
        self.seen.append(request)
        self.calls.append(CURRENT_CALL.get())
        if isinstance(self.result, Exception):
            raise self.result
        return self.result() if callable(self.result) else self.result


@pytest.fixture
def handler() -> Handler:
    return Handler()


@pytest.fixture(scope="session")
def seeded_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated store that says what `build_snapshot` says."""
    path = tmp_path_factory.mktemp("policy") / "policy.db"
    store = Store.open(f"sqlite:///{path}")
    store.migrate()
    snapshot = build_snapshot()
    with store.change(actor="test", at=0.5) as change:
        for expert in snapshot.experts.values():
            change.put(expert)
        for tenant in TENANTS:
            change.put(tenant)
        for agreement in agreements():
            change.put(agreement)
        kept = {}
        for record in snapshot.keys.values():
            names = {"tenant_id": record.tenant_id, "owner_id": record.owner_id, "expires": record.expires}
            made = change.add_key(record.prefix, prefix=record.prefix, role=record.role, **names)
            kept[record.prefix] = made.key_id
    with store.change(actor="test", at=1.0) as change:
        change.revoke_key(kept["sk-revoked"])
    store.close()
    return path


@pytest.fixture
def real_store(seeded_database: Path, tmp_path: Path) -> Iterator[Store]:
    """A store of the test's own."""
    path = shutil.copy(seeded_database, tmp_path / "policy.db")
    store = Store.open(f"sqlite:///{path}")
    yield store
    store.close()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Journal]:
    """A journal of the test's own."""
    journal = Journal(tmp_path / "ledger.db", clock=time.time, count=USAGE.count)
    yield journal
    journal.close()


@pytest.fixture
def receipts(real_store: Store, tmp_path: Path) -> Iterator[Receipts]:
    """Receipts of the test's own, whose maker is not started: `receipts.maker.work()` makes them."""
    signer, pseudonym = KeyFile(tmp_path / "receipts.pem"), lambda owner, tenant: f"anon-{owner}-{tenant}"
    digest = partial(policy_digest, real_store.engine)
    ledger = tmp_path / "ledger.db"
    with kept(tmp_path, ledger, signer, clock=time.time, policy_digest=digest, pseudonym=pseudonym) as made:
        yield made


@pytest.fixture
def services(
    store: FakeStore, real_store: Store, handler: Handler, ledger: Journal, receipts: Receipts, tmp_path: Path
) -> Any:
    """The application's parts around a client without an engine."""
    from flexgate.server.engine.frontend.calls import ExpertInfo
    from flexgate.server.engine.protocol.slots import SlotMap
    from flexgate.server.experts.uploads import Uploads
    from flexgate.server.inference.fair_queue import FairQueue
    from flexgate.server.lifecycle.services import Services
    from flexgate.server.policy.source import PolicySource

    infos = tuple(ExpertInfo(id_, owner, "", slot, 1, True) for slot, (id_, owner) in enumerate(EXPERTS.items()))
    client = SimpleNamespace(
        weights_epoch=3,
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
    one = SimpleNamespace
    handlers = SimpleNamespace(
        chat=one(create_chat_completion=handler),
        forced_chat=one(create_chat_completion=handler),
        completion=one(create_completion=handler),
        responses=one(create_responses=handler),
        forced_responses=one(create_responses=handler),
        tokenization=one(create_tokenize=handler, create_detokenize=handler),
        has_chat_template=True,
    )
    policy = PolicySource(store, lambda: dict.fromkeys(EXPERTS, 1), lease_s=2.0, poll_s=0.01)
    policy.confirm()
    return Services(
        client=client,  # type: ignore[arg-type]
        handlers=handlers,  # type: ignore[arg-type]
        policy=policy,
        store=real_store,
        ledger=ledger,
        receipts=receipts,
        experts=_expert_service(client, real_store, tmp_path),
        uploads=Uploads(tmp_path / "uploads", most_bytes=1 << 20, clock=time.time),
        queue=FairQueue(64, share=0.5, most_queued=1024, seconds=300),
        model_names=("tiny", "alias"),
        started=time.time(),
    )


def _expert_service(client: Any, store: Store, directory: Path) -> Any:
    """The real service over slots that nobody may touch."""
    from flexgate.server.experts.repository import WeightsRepository
    from flexgate.server.experts.service import ExpertService
    from flexgate.server.experts.slot_pool import Places, SlotPool

    def unused(*_: Any) -> Any:
        raise AssertionError("there is no engine")

    places = Places(private=directory / "experts", base=unused, trusted_keys=None)
    pool = SlotPool(client, SimpleNamespace(), WeightsRepository(store), places, {}, per_owner=1)  # type: ignore[arg-type]
    return ExpertService(pool, canary=unused, confirm=unused, record=unused, clock=time.time)


@pytest.fixture
def make_client(services: Any) -> Callable[..., httpx.AsyncClient]:
    """An HTTP client of the application; `hosts` and the key can be chosen."""
    from flexgate.server.lifecycle.app import build_app

    app = cache(lambda hosts: build_app(services, hosts=hosts))

    def make(key: str | None = "sk-t", hosts: Any = None) -> httpx.AsyncClient:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        application = app(None if hosts is None else tuple(hosts))
        transport = httpx.ASGITransport(application, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)

    return make


@pytest_asyncio.fixture
async def client(make_client: Callable[..., httpx.AsyncClient]) -> AsyncIterator[httpx.AsyncClient]:
    async with make_client() as http:
        yield http


def _listening() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


@pytest_asyncio.fixture
async def urls(services: Any) -> AsyncIterator[tuple[str, str]]:
    """The public and the administration address of a running server without an engine."""
    from flexgate.server.lifecycle.serve import run
    from flexgate.server.lifecycle.settings import Settings

    services.client.errored = False
    services.experts.follow = lambda *_: asyncio.Event().wait()  # there is no engine to follow the policy in
    public, admin = _listening(), _listening()
    settings = Settings(model=Path("none"), admin_port=0)
    running = asyncio.create_task(run(settings, services, public, admin))
    addresses = tuple(f"http://127.0.0.1:{sock.getsockname()[1]}" for sock in (public, admin))
    async with httpx.AsyncClient() as http:
        for address in addresses:
            deadline = time.monotonic() + 30
            while not running.done():
                assert time.monotonic() < deadline
                try:
                    await http.get(f"{address}/health")
                    break
                except httpx.TransportError:
                    await asyncio.sleep(0.02)
    assert not running.done(), running.exception()
    yield addresses
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    for sock in (public, admin):
        sock.close()
