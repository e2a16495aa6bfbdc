"""Whether other programs ran beside a measurement: what of the processors' time was neither the server's nor ours."""

import time
from dataclasses import dataclass
from typing import Self

import psutil

MOST = 0.15
"""Cores that others may use on average; the kernel's own work for a server and its clients comes to less."""


@dataclass(frozen=True)
class Used:
    """Seconds of processors' time used until a moment, by the whole machine and by some processes of it."""

    at: float
    machine: float
    ours: float

    @classmethod
    def now(cls, server: int) -> Self:
        """Until now; ours are this process, the process `server` and its descendants."""
        times = psutil.cpu_times()
        busy = sum(times) - times.idle - times.iowait - times.guest - times.guest_nice  # a guest's are in `user`
        family = psutil.Process(server)
        ours = (process.cpu_times() for process in (psutil.Process(), family, *family.children(recursive=True)))
        return cls(time.monotonic(), busy, sum(used.user + used.system for used in ours))

    def others_since(self, before: "Used") -> float:
        """Cores that other programs used on average since then."""
        passed = self.at - before.at
        return max(0.0, (self.machine - before.machine - (self.ours - before.ours)) / passed)
