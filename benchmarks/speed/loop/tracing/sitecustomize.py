"""Instruments of the benchmark `loop`, in every process that a server starts: long callbacks and long engine steps.

Python imports a module of this name by itself where its folder is on PYTHONPATH. It does nothing unless
FLEXGATE_TRACE names a folder; there, each process appends one JSON line for whatever took its thread longer than
THRESHOLD. Times are thread time, which other work on the machine does not use up. uvloop's callbacks are native and
cannot be measured one by one: asyncio's loop runs in its place, with the same callbacks.
"""

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

FOLDER = os.environ.get("FLEXGATE_TRACE")
THRESHOLD = 0.005  # seconds of thread time; what is shorter leaves no line
SAMPLE_EVERY = 0.005
FRAMES = 40


def record(kind: str, what: str, began: float, wall: float, busy: float, stacks: Counter[tuple[str, ...]]) -> None:
    """Append what took long; ``at`` is the monotonic clock, which all processes share."""
    line = {"kind": kind, "what": what, "at": began, "wall": wall, "busy": busy, "stacks": stacks.most_common(3)}
    with Path(FOLDER or "", f"{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


class Watch:
    """Thread time of one piece of work at a time, and where it went: the stack at every tick of a timer.

    A native call is charged to the line that made it: Python runs a signal's handler when the call returns.
    """

    def __init__(self) -> None:
        self.stacks: Counter[tuple[str, ...]] = Counter()
        signal.signal(signal.SIGALRM, self._sample)

    def run(self, kind: str, what: Any, work: Callable[[], Any]) -> Any:
        """Run `work`; ``what`` is named if it took long."""
        self.stacks.clear()
        began, busy = time.monotonic(), time.thread_time()
        signal.setitimer(signal.ITIMER_REAL, SAMPLE_EVERY, SAMPLE_EVERY)
        try:
            return work()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            busy = time.thread_time() - busy
            if busy > THRESHOLD:
                record(kind, str(what), began, time.monotonic() - began, busy, self.stacks)

    def _sample(self, _number: int, frame: FrameType | None) -> None:
        stack: list[str] = []
        while frame is not None and len(stack) < FRAMES and frame.f_code.co_filename != __file__:
            code = frame.f_code
            stack.append(f"{code.co_filename}:{frame.f_lineno} {code.co_qualname}")
            frame = frame.f_back
        self.stacks[tuple(stack)] += 1


def watch_callbacks() -> None:
    """Time every callback of the main thread's event loop."""
    import uvloop

    plain, watch = asyncio.Handle._run, Watch()  # type: ignore[attr-defined]

    def run(handle: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            plain(handle)
        else:
            watch.run("callback", handle, lambda: plain(handle))

    asyncio.Handle._run = run  # type: ignore[attr-defined]
    uvloop.run = asyncio.run


def watch_changes(module: Any) -> None:
    """Count the passes of the main thread's event loop, and note what each call of the administration saw of them."""
    base = asyncio.base_events.BaseEventLoop
    once, handler_of = base._run_once, module.Route.get_route_handler  # type: ignore[attr-defined]
    passes: list[float] = []  # thread time of each

    def run_once(loop: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            return once(loop)
        began = time.thread_time()
        once(loop)
        passes.append(time.thread_time() - began)
        return None

    def get_route_handler(self: Any) -> Callable[[Any], Any]:
        answer = handler_of(self)

        async def answered(request: Any) -> Any:
            if not hasattr(self, "operation"):
                return await answer(request)
            began, first = time.monotonic(), len(passes)
            try:
                return await answer(request)
            finally:
                seen = passes[first:]
                line = {
                    "what": f"{request.method} {self.path}",
                    "wall": time.monotonic() - began,
                    "passes": len(seen) + 1,
                    "busy": sum(seen),
                    "longest": max(seen, default=0.0),
                }
                with Path(FOLDER or "", f"{os.getpid()}.changes.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")

        return answered

    base._run_once, module.Route.get_route_handler = run_once, get_route_handler  # type: ignore[attr-defined]


def watch_steps(module: Any) -> None:
    """Time every step of an engine core."""

    def timed(step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def run(core: Any) -> Any:
            if not hasattr(core, "_watch"):
                core._watch = Watch()
            return core._watch.run("step", step.__qualname__, lambda: step(core))

        return run

    for name in ("step", "step_with_batch_queue"):
        setattr(module.EngineCore, name, timed(getattr(module.EngineCore, name)))


class AfterImport:
    """Calls `then` with the module of a name once it is imported."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self._name, self._then = name, then

    def find_spec(self, name: str, _path: Sequence[str] | None = None, _target: Any = None) -> ModuleSpec | None:
        """The module's own spec, with a loader that calls `then`."""
        if name != self._name:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                self._then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if FOLDER:
    if any(Path(word).name == "flexgate" for word in sys.orig_argv[:3]):
        if os.environ.get("FLEXGATE_TRACE_CHANGES"):
            import uvloop

            uvloop.run = asyncio.run
            sys.meta_path.insert(0, AfterImport("flexgate.server.http.routes", watch_changes))  # type: ignore[arg-type]
        else:
            watch_callbacks()
    else:
        sys.meta_path.insert(0, AfterImport("vllm.v1.engine.core", watch_steps))  # type: ignore[arg-type]
