"""What an OpenTelemetry span says of a request for inference: the conventions of gen_ai, and what flexgate decided.

No text of prompts or responses, and of experts only those that took part, which the tenant can see as well.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request

from flexgate.server.http.auth import context_of
from flexgate.server.http.tracing import Step, Traced, Tracing, Value
from flexgate.server.inference.pipeline import Endpoint, InferenceRequest, InferenceServices

_OPERATIONS: Final[Mapping[str, tuple[str, str]]] = {
    "/v1/chat/completions": ("chat", "chatcmpl-"),
    "/v1/completions": ("text_completion", "cmpl-"),
    "/v1/responses": ("chat", "resp_"),
}
"""By path: the convention's name of the operation, and what the id of a response begins with."""
_ASKED: Final = {
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "n": "gen_ai.request.choice.count",
    "stream": "gen_ai.request.stream",
    "max_tokens": "gen_ai.request.max_tokens",
    "max_output_tokens": "gen_ai.request.max_tokens",
    "max_completion_tokens": "gen_ai.request.max_tokens",
}
"""Fields of bodies, and their names in the convention."""
LARGEST: Final = 2**53
FAULT: Final = 500
"""The least status of a server's fault."""
_CARRIED: Final = ("traceparent", "tracestate")
MOST_CARRIED: Final = 512
"""Characters of a header that names a trace; a longer one is left out."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Clock:
    """Nanoseconds of Unix time that do not go back within a request."""

    wall: int
    steady: int

    def now(self) -> int:
        return self.wall + time.perf_counter_ns() - self.steady


class TracedRequest(InferenceRequest):
    """A request that is timed, and told to `tracing` once its response has been sent."""

    def __init__(self, http: Request, services: InferenceServices, endpoint: Endpoint, tracing: Tracing) -> None:
        super().__init__(http, services, endpoint)
        self._tracing = tracing
        self._clock = _Clock(time.time_ns(), time.perf_counter_ns())
        self._steps: list[Step] = []
        context_of(http).over = self._over

    async def prepare(self) -> None:
        """Take the five steps, each timed."""
        for step in (self.authenticate, self.read, self.validate, self.decide, self.reserve):
            began = self._clock.now()
            try:
                waits = step()
                if waits is not None:
                    await waits
            finally:
                self._steps.append(Step(step.__name__, began, self._clock.now()))

    def reserve(self) -> None:
        """Reserve, and have the reasons kept for which the engine finished."""
        super().reserve()
        self.call.finish_reasons = {}

    def _over(self, status: int) -> None:
        """Tell what is known of it, if its caller has a key. A fault in here costs the span, not the request."""
        if self.context.principal is None:
            return  # callers without a key would push out the spans of those with one
        try:
            self._tracing.add(self._traced(status))
        except Exception as error:
            logger.error("a span could not be made", exc_info=error)

    def _traced(self, status: int) -> Traced:
        operation, prefix = _OPERATIONS[self.http.scope["path"]]
        said: dict[str, Value] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "flexgate",
            "http.request.method": "POST",
            "http.route": self.http.scope["path"],
            "flexgate.request_id": self.context.request_id,
        }
        code = self.context.code or getattr(getattr(self, "call", None), "failed", None)
        if code is not None:
            said["flexgate.code"] = code
        if status:  # 0 where the client left before
            said["http.response.status_code"] = status
        if self.context.error is not None:
            denied = Counter(code for _, code, _ in self.context.error.rules)
            said |= {f"flexgate.experts.denied.{code}": count for code, count in denied.items()}
        if self.context.principal is not None and self.context.principal.tenant_id is not None:
            said["flexgate.project"] = self.context.principal.tenant_id
        if hasattr(self, "body"):
            said |= self._asked()
        if hasattr(self, "decision"):
            said |= self._decided()
        if hasattr(self, "call"):
            said |= self._used(prefix)
        carrier = {
            name: value for name in _CARRIED if 0 < len(value := self.http.headers.get(name, "")) <= MOST_CARRIED
        }
        fault = code if status >= FAULT or self.broken else None
        if fault is not None:
            said["error.type"] = fault
        model = self.services.model_names[0]
        return Traced(
            f"{operation} {model}", self._clock.wall, self._clock.now(), said, fault, tuple(self._steps), carrier
        )

    def _asked(self) -> dict[str, Value]:
        """What was asked for, as far as it was stated: numbers alone, for vLLM may not have looked at them yet."""
        body: Mapping[str, Any] = self.body
        found = {name: body[field] for field, name in _ASKED.items() if _is_number(body.get(field))}
        return {"gen_ai.request.model": body.get("model") or self.services.model_names[0], **found}

    def _decided(self) -> dict[str, Value]:
        excluded = Counter(reason.code for reason in self.decision.excluded)
        return {
            "flexgate.decision_id": self.decision.decision_id,
            "flexgate.policy_version": self.decision.policy_version,
            "flexgate.experts.allowed": len(self.decision.allowed),
            **{f"flexgate.experts.excluded.{code}": count for code, count in excluded.items()},
        }

    def _used(self, prefix: str) -> dict[str, Value]:
        call = self.call
        used = call.attribution()
        found: dict[str, Value] = {
            "gen_ai.response.model": self.services.model_names[0],
            "gen_ai.usage.input_tokens": call.prompt_tokens(),
            "gen_ai.usage.output_tokens": call.new_tokens(),
            "gen_ai.usage.cache_read.input_tokens": used.cached_prompt_tokens,
            "flexgate.weights_epoch": self.weights_epoch,
            "flexgate.experts.used": [use.expert for use in used.experts if use.tokens],
        }
        if call.finish_reasons:
            found["gen_ai.response.finish_reasons"] = list(call.finish_reasons.values())
        if self.answered:
            found["gen_ai.response.id"] = prefix + self.context.request_id.removeprefix("req_")
        return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < LARGEST
