"""What the routes work with, put together once by `flexgate.server.app`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flexgate.policies.cache import DecisionCache
from flexgate.server.openai.limits import Limits
from flexgate.server.policy import PolicySource

if TYPE_CHECKING:
    from flexgate.server.engine.client import GatedEngineClient
    from flexgate.server.openai.handlers import Handlers


@dataclass(slots=True, kw_only=True)
class Services:
    """The running parts. `draining` is set once, when the server is told to stop."""

    client: GatedEngineClient
    handlers: Handlers
    policy: PolicySource
    model_names: tuple[str, ...]
    started: float
    limits: Limits = field(default_factory=Limits)
    body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    decisions: DecisionCache = field(default_factory=DecisionCache)
    clock: Callable[[], float] = time.time
    draining: bool = False
