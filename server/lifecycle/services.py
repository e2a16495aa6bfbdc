"""What the routes work with, put together once by `flexgate.server.lifecycle.container`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from flexgate.policies.cache import DecisionCache
from flexgate.policies.store.store import Store
from flexgate.server.engine.protocol.clock import Clock
from flexgate.server.http.body import Arriving
from flexgate.server.http.offload import Offload
from flexgate.server.http.tracing import Tracing
from flexgate.server.http.usage_metrics import USAGE
from flexgate.server.inference.enforcement import RevokedKeys, RunningRequests
from flexgate.server.inference.fair_queue import FairQueue
from flexgate.server.inference.limits.budget_usage import BudgetUsage
from flexgate.server.inference.limits.limiter import Limiter
from flexgate.server.inference.request.limits import Limits
from flexgate.server.ledger.copies import Copies
from flexgate.server.ledger.errors import LedgerFailure
from flexgate.server.ledger.journal import Journal
from flexgate.server.ledger.reading import Local, Source
from flexgate.server.ledger.receipts.heads import Heads
from flexgate.server.ledger.receipts.service import Receipts
from flexgate.server.policy.decision_samples import DecisionSamples
from flexgate.server.policy.denial_log import Denials
from flexgate.server.policy.retention import Retention
from flexgate.server.policy.source import PolicySource
from flexgate.server.policy.unstored import Unstored

if TYPE_CHECKING:
    from flexgate.server.engine.frontend.client import GatedEngineClient
    from flexgate.server.experts.service import ExpertService
    from flexgate.server.experts.uploads import Uploads
    from flexgate.server.inference.openai.handlers import Handlers


@dataclass(slots=True, kw_only=True)
class Services:
    """The running parts. `draining` is set once, when the server is told to stop."""

    client: GatedEngineClient
    handlers: Handlers
    policy: PolicySource
    store: Store
    ledger: Journal
    receipts: Receipts
    experts: ExpertService
    uploads: Uploads
    queue: FairQueue
    model_names: tuple[str, ...]
    started: float
    experts_dir: Path | None = None
    limits: Limits = field(default_factory=Limits)
    body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    arriving: Arriving = field(default_factory=Arriving)
    offload: Offload = field(default_factory=Offload)
    decisions: DecisionCache = field(default_factory=DecisionCache)
    clock: Callable[[], float] = field(default_factory=Clock)
    heads: Heads | None = None
    draining: bool = False
    revoked_keys: RevokedKeys = "end"
    audit_denials_days: int = 90
    ledger_failure: LedgerFailure = "refuse"
    usage_days: int = 400
    tracing: Tracing | None = None
    denials: Denials = field(init=False)
    samples: DecisionSamples = field(init=False)
    budget_usage: BudgetUsage = field(init=False)
    limiter: Limiter = field(init=False)
    running: RunningRequests = field(init=False)
    unstored: Unstored = field(init=False)
    retention: Retention = field(init=False)
    copies: Copies | None = field(init=False)
    usage: Source = field(init=False)

    def __post_init__(self) -> None:
        self.denials = Denials(self.store, clock=self.clock)
        self.samples = DecisionSamples(self.store)
        self.retention = Retention(self.store, days=self.audit_denials_days, clock=self.clock)
        self.copies = Copies.of(self.ledger, self.store.engine)
        self.usage = Local(self.ledger.path) if self.copies is None else self.copies.shared
        self.ledger.retention.until(lambda: self.receipts.maker.signed, "receipts")
        if (copies := self.copies) is not None:
            self.ledger.retention.until(lambda: copies.sequence, "database")
        self.ledger.retention.keep(self.usage_days)
        self.budget_usage = BudgetUsage(self.store, server=self.ledger.id, clock=self.clock)
        self.limiter = Limiter(self.budget_usage, wall_clock=self.clock)
        self.running = RunningRequests(
            self.client, clock=self.clock, policy=self.policy, revoked_keys=self.revoked_keys
        )
        self.policy.enforce_with(self.running.enforce)
        self.policy.expire_with(self.running.expire)
        self.unstored = Unstored(self.policy)
        USAGE.name_by(lambda: {} if self.policy.stored is None else self.policy.stored.experts)
