"""What the routes work with, made once of a running engine, the settings and the policy store.

This loads vLLM's handlers, so it is imported after everything that can be refused without them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from flexgate.experts.checkpoint.base import base_identity
from flexgate.experts.package.signature import TrustedKeys
from flexgate.policies.audit import Event
from flexgate.policies.explain import needing as projects_needing
from flexgate.policies.store.change_notifications import ChangeNotifications
from flexgate.policies.store.identity import FileIdentity
from flexgate.policies.store.store import Store
from flexgate.server.engine.frontend.calls import ExpertSlotRef
from flexgate.server.engine.frontend.canary import try_added
from flexgate.server.engine.frontend.client import GatedEngineClient
from flexgate.server.engine.frontend.launch import RunningEngine
from flexgate.server.experts.repository import WeightsRepository
from flexgate.server.experts.service import ExpertService
from flexgate.server.experts.slot_pool import Places, SlotPool
from flexgate.server.experts.uploads import Uploads
from flexgate.server.experts.versions import Merged
from flexgate.server.http.offload import Offload
from flexgate.server.http.tracing import Tracing
from flexgate.server.inference.fair_queue import FairQueue
from flexgate.server.inference.openai.handlers import build_handlers
from flexgate.server.inference.request.limits import Limits
from flexgate.server.ledger.journal import Journal
from flexgate.server.ledger.receipts.heads import Heads
from flexgate.server.ledger.receipts.service import Receipts
from flexgate.server.lifecycle.serve import DEMO_TOOL_PARSER
from flexgate.server.lifecycle.services import Services
from flexgate.server.lifecycle.settings import Settings
from flexgate.server.policy.replicas import Replicas
from flexgate.server.policy.rollback_guard import RollbackGuard
from flexgate.server.policy.source import LAST_TRY_S, PolicySource

CANARY_SECONDS: Final = 60.0


def build_services(
    settings: Settings,
    model: Path,
    engine: RunningEngine,
    store: Store,
    ledger: Journal,
    receipts: Receipts,
    rollback_guard: RollbackGuard,
    directory: FileIdentity,
    merged: Merged,
    keys: TrustedKeys | None,
    clock: Callable[[], float],
    tracing: Tracing | None,
) -> Services:
    """What the routes work with."""
    client = engine.client
    names = settings.served_model_name or (("flexgate-demo",) if settings.demo else (model.name,))
    policy = PolicySource(
        store,
        partial(getattr, client, "slot_epochs"),
        lease_s=settings.policy_lease_seconds,
        poll_s=settings.policy_poll_seconds,
        replicas=Replicas(
            store.engine, lease_s=settings.policy_lease_seconds + settings.policy_poll_seconds + LAST_TRY_S
        ),
        notifications=ChangeNotifications(store.engine),
        rollback_guard=rollback_guard,
        require_files=directory.require,
    )
    offload = Offload()
    queue = FairQueue(
        settings.max_num_seqs,
        share=settings.project_share,
        most_queued=settings.max_queued,
        seconds=settings.queue_seconds,
    )
    tool_parser = settings.tool_call_parser or (DEMO_TOOL_PARSER if settings.demo else None)
    handlers = build_handlers(
        client,
        offload,
        model_names=names,
        chat_template=settings.chat_template,
        tool_call_parser=tool_parser,
    )
    return Services(
        client=client,
        handlers=handlers,
        policy=policy,
        store=store,
        ledger=ledger,
        receipts=receipts,
        heads=None
        if settings.heads_file is None
        else Heads(store, receipts.book, settings.heads_file, seconds=settings.heads_seconds),
        experts=_expert_service(settings, model, engine, store, policy, merged, keys, clock),
        uploads=Uploads(settings.directory() / "uploads", most_bytes=settings.max_package_bytes, clock=time.time),
        experts_dir=settings.experts_dir,
        model_names=names,
        started=clock(),
        clock=clock,
        revoked_keys=settings.revoked_keys,
        audit_denials_days=settings.audit_denials_days,
        ledger_failure=settings.ledger_failure,
        usage_days=settings.usage_days,
        tracing=tracing,
        queue=queue,
        limits=_limits(settings, client, queue.alone, has_tool_parser=tool_parser is not None),
        body_bytes=settings.max_body_bytes,
        body_seconds=settings.body_seconds,
        offload=offload,
    )


def _limits(settings: Settings, client: GatedEngineClient, seats: int, *, has_tool_parser: bool) -> Limits:
    """With the longest text that could fit the model, as vLLM reckons: its longest token, over and over.

    No prompt has more choices than `seats`, those that one project may take.
    """
    tokens = int(client.model_config.max_model_len)
    longest = int(client.renderer.tokenizer.max_chars_per_token)
    limits = replace(settings.limits, n=min(settings.max_n, seats), has_tool_parser=has_tool_parser)
    return replace(limits, prompt_tokens=tokens, prompt_chars=tokens * longest)


def _expert_service(
    settings: Settings,
    model: Path,
    engine: RunningEngine,
    store: Store,
    policy: PolicySource,
    merged: Merged,
    keys: TrustedKeys | None,
    clock: Callable[[], float],
) -> ExpertService:
    """The service over a running engine; `clock` (Unix seconds) stamps every change."""
    places = Places(
        private=settings.directory() / "experts",
        base=lambda: base_identity(model),
        trusted_keys=keys,
    )
    slots = {slot for rank in (None, 1) for slot in engine.client.slots_for(rank)}
    free = len(slots - {info.slot for info in engine.client.experts()})
    per_owner = settings.max_experts_per_owner or max(1, free // 2)
    pool = SlotPool(engine.client, engine.slots, WeightsRepository(store), places, merged, per_owner=per_owner)

    def record(actor: str, action: str, detail: dict[str, Any]) -> None:
        store.record([Event(at=clock(), actor=actor, action=action, detail=detail)], urgent=True)

    async def canary(public: ExpertSlotRef, added: ExpertSlotRef) -> None:
        await try_added(engine.client, engine.slots, public, added, seconds=CANARY_SECONDS)

    def needing(expert: str) -> tuple[str, ...]:
        return () if policy.stored is None else projects_needing(policy.stored, expert, clock())

    return ExpertService(pool, canary=canary, confirm=policy.confirm, record=record, clock=clock, needing=needing)
