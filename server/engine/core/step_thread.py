"""Native work beside a step: a thread that is left behind, with what it does, once that has taken too long."""

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final

MAX_SECONDS: Final = 0.02
"""Of processor time for one piece of work: a machine that is busy elsewhere makes nothing late."""
MAX_LEFT: Final = 2
"""Threads that are left behind at once: while they are not done, nothing new is begun."""

_Job = tuple[Callable[[], Any], threading.Event, list[Any]]


class TooLate(Exception):
    """The work goes on without anyone waiting for it; nothing that it uses may be touched again."""


class StepThread:
    """Runs one piece of work at a time for the thread that it belongs to."""

    def __init__(self) -> None:
        self._left: list[threading.Thread] = []
        self._begin()

    def run(self, work: Callable[[], Any]) -> Any:
        """What ``work`` returns, or raises.

        Raises:
            TooLate: it was not done in time, or as many threads as may be left behind are still busy.
        """
        self._left = [thread for thread in self._left if thread.is_alive()]
        if len(self._left) >= MAX_LEFT:
            raise TooLate
        done, result = threading.Event(), list[Any]()
        began = time.clock_gettime(self._clock)
        self._jobs.put((work, done, result))
        while not done.wait(MAX_SECONDS):
            if time.clock_gettime(self._clock) - began >= MAX_SECONDS:
                self._jobs.put(None)
                self._left.append(self._thread)
                self._begin()
                raise TooLate
        (value, error) = result
        if error is not None:
            raise error
        return value

    def _begin(self) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name="flexgate-masks", daemon=True)
        self._thread.start()
        self._clock = time.pthread_getcpuclockid(self._thread.ident or 0)


def _work(jobs: "SimpleQueue[_Job | None]") -> None:
    while (job := jobs.get()) is not None:
        work, done, result = job
        try:
            result += [work(), None]
        except BaseException as error:
            result += [None, error]
        done.set()
