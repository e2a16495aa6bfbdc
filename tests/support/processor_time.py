"""What processes use of processors: a bound that holds on a busy machine too, where one of wall time would not."""

from contextlib import suppress

import psutil


class ProcessorTime:
    """Seconds that a process and all below it have used since this was made, those that ended included.

    What one used between the last look at it and its end is not counted: look often.
    """

    def __init__(self, parent: int) -> None:
        self._parent = psutil.Process(parent)
        self._before = self._used()
        self._seen = dict(self._before)

    def seconds(self) -> float:
        """What has been used until now."""
        self._seen |= self._used()
        return sum(self._seen.values()) - sum(self._before.values())

    def _used(self) -> dict[psutil.Process, float]:
        used = {}
        for process in (self._parent, *self._parent.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                used[process] = times.user + times.system
        return used
