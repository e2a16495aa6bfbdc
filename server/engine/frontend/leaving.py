"""End a process after its exit handlers, without the interpreter's last steps.

In those, Triton's bindings count what is still referenced and print dozens of lines of it ("nanobind: leaked …") after
Ctrl-C; nothing is freed that the end of the process would not free.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def leaving() -> Iterator[None]:
    """Let the block be all that the process does; handlers that are registered in it run, and its status is kept."""
    status = [1]
    atexit.register(_leave, status)  # the first to be registered is the last to run
    try:
        yield
    except SystemExit as ended:
        status[0] = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    status[0] = 0


def _leave(status: list[int]) -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or no one reads it
            stream.flush()
    os._exit(status[0])
