"""Jobs that add experts: their stage, progress and outcome."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter, OrderedDict, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal
from weakref import WeakSet

from flexgate.server.experts.schemas import ExpertJob, JobError, JobProgress, JobResult

STAGES: Final = ("received", "copied", "verified", "loaded", "agreed", "canary", "dark", "live")
"""In this order. The copy comes before the check, so that what is checked is what is used; `dark` is
committed and not permitted yet, `live` may be named by gates that an agreement allows."""
KEPT: Final = 100
MOST_WATCHED: Final = 16
"""Streams of jobs that one caller has open."""

State = Literal["running", "succeeded", "failed"]


@dataclass(slots=True, kw_only=True)
class Job:
    """A job that adds one expert. Times are Unix seconds; `done` of `total` is in `unit`.

    `actor` is the key that began it, `limited_with` what it counts for and who may see it; see `Principal`.
    `committed` says that a restart will load it, whatever happens now; None where the store did not say.
    """

    id: str
    package: str
    actor: str
    limited_with: str
    created: float
    expert: str | None = None
    version: int | None = None
    state: State = "running"
    stage: str = STAGES[0]
    done: int = 0
    total: int = 0
    unit: str = ""
    finished: float | None = None
    error: dict[str, str] | None = None
    result: dict[str, Any] | None = None
    committed: bool | None = False
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _revision: int = 0

    def shown(self) -> ExpertJob:
        """As the API shows it."""
        return ExpertJob(
            id=self.id,
            package=self.package,
            expert=self.expert,
            version=self.version,
            status=self.state,
            stage=self.stage,
            stages=list(STAGES),
            progress=JobProgress(done=self.done, total=self.total, unit=self.unit),
            created_at=int(self.created),
            finished_at=None if self.finished is None else int(self.finished),
            error=None if self.error is None else JobError(**self.error),
            result=None if self.result is None else JobResult(**self.result),
        )

    async def at(self, stage: str, done: int = 0, total: int = 0, unit: str = "") -> None:
        """Enter a stage and notify watchers."""
        self.stage, self.done, self.total, self.unit = stage, done, total, unit
        await self._tell()

    async def succeed(self, result: dict[str, Any], now: float) -> None:
        """Mark as succeeded."""
        self.state, self.result, self.finished = "succeeded", result, now
        await self._tell()

    async def fail(self, code: str, message: str, now: float) -> None:
        """Mark as failed at the current stage."""
        self.state, self.error, self.finished = "failed", {"code": code, "message": message}, now
        await self._tell()

    async def watch(self) -> AsyncIterator[ExpertJob]:
        """Every state from now to the last; states that follow each other fast may be left out."""
        while True:
            seen = self._revision
            yield self.shown()
            if self.state != "running":
                return
            async with self._changed:
                while self._revision == seen:
                    await self._changed.wait()

    async def _tell(self) -> None:
        self._revision += 1
        async with self._changed:
            self._changed.notify_all()


class Jobs:
    """The newest jobs of this process."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._opening: Counter[str] = Counter()
        self._watched: defaultdict[str, WeakSet[AsyncIterator[ExpertJob]]] = defaultdict(WeakSet)

    @contextmanager
    def opening(self, limited_with: str) -> Iterator[None]:
        """Count a job as running while its package is looked for."""
        self._opening[limited_with] += 1
        try:
            yield
        finally:
            self._opening[limited_with] -= 1
            if not self._opening[limited_with]:
                del self._opening[limited_with]

    def open(self, package: str, actor: str, limited_with: str) -> Job:
        """A new job; the oldest ended one is forgotten when there are many."""
        id_ = f"job_{secrets.token_hex(8)}"
        job = Job(id=id_, package=package, actor=actor, limited_with=limited_with, created=self._clock())
        self._jobs[job.id] = job
        ended = [id_ for id_, known in self._jobs.items() if known.state != "running"]
        for id_ in ended[: max(0, len(self._jobs) - KEPT)]:
            del self._jobs[id_]
        return job

    def running(self, limited_with: str) -> int:
        """How many jobs of a caller, whichever key began them, have not ended."""
        running = sum(job.state == "running" and job.limited_with == limited_with for job in self._jobs.values())
        return running + self._opening[limited_with]

    def bring(self, expert: str) -> bool:
        """Whether a job that has not ended is known to bring an expert."""
        return any(job.state == "running" and job.expert == expert for job in self._jobs.values())

    def watch(self, job: Job, limited_with: str) -> AsyncIterator[ExpertJob] | None:
        """The states of a job, as `Job.watch`; None while a caller has `MOST_WATCHED` such streams."""
        watched = self._watched[limited_with]
        if len(watched) >= MOST_WATCHED:
            return None
        states = job.watch()
        watched.add(states)
        return states

    def get(self, id_: str) -> Job | None:
        """A job by its id."""
        return self._jobs.get(id_)
