"""The engine core's process, begun before vLLM asks for it, so that it loads vLLM while this process does.

vLLM spawns its engine core once it knows its whole configuration. What was spawned then loads all of vLLM once more,
while this process waits. What a spawned process does first is the same whatever it will run: here it does that early,
and is told what to run later, through the pipe that a spawned process is always told through.
"""

import io
import logging
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing import popen_spawn_posix, reduction, resource_tracker, spawn, util
from multiprocessing.context import SpawnContext, SpawnProcess, set_spawning_popen
from pathlib import Path
from typing import Any, Final, NoReturn, Self

logger = logging.getLogger(__name__)

READ_WHEN_USED: Final = frozenset({"LOCAL_WORLD_SIZE", "NUMEXPR_MAX_THREADS"})
"""Variables, besides vLLM's own, that may still change once a process has loaded vLLM."""


LOADED: Final = ("vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "flexgate.server.engine.worker")
"""What the engine core imports anyway."""


class EarlyProcess:
    """A process that loads ``modules`` and waits to be told what to run; untold, it ends with its ``with`` block.

    Attributes:
        pid: of the process.
        sentinel: a file descriptor, ready to read once the process has ended.
        pipe: the file descriptor through which it is told; the process follows its end.
    """

    def __init__(self, modules: Sequence[str] = LOADED) -> None:
        set_for_cpu()
        self.sentinel, kept_open = os.pipe()
        told_by, self.pipe = os.pipe()
        tracker = resource_tracker.getfd()
        if tracker is None:
            raise RuntimeError("multiprocessing's resource tracker does not run")
        executable, *options = spawn.get_command_line()
        program = f"from {__name__} import wait; wait({tuple(modules)}, {tracker}, {told_by})"
        options[options.index("-c") + 1] = program
        # -P: a folder that a server happens to be started in holds nothing to import.
        command = [os.fsencode(word) for word in (executable, "-P", *options)]
        self.pid = util.spawnv_passfds(command[0], command, [tracker, kept_open, told_by])
        os.close(kept_open)
        os.close(told_by)
        self._waiting = True

    def take(self) -> bool:
        """Whether it still waits to be told; true once."""
        if not self._waiting:
            return False
        self._waiting = False
        if os.waitpid(self.pid, os.WNOHANG) == (0, 0):
            return True
        self.close()
        return False

    def discard(self) -> None:
        """End it, unless somebody took it."""
        if self.take():
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def close(self) -> None:
        """Close this side's file descriptors; a process that is not told yet ends."""
        os.close(self.sentinel)
        os.close(self.pipe)


def set_for_cpu() -> None:
    """Set what vLLM has its processes on CPU read as they start (`CpuPlatform.check_and_update_config`)."""
    import torch

    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    os.environ["TORCHINDUCTOR_CPP_DYNAMIC_THREADS"] = "1"
    before = os.environ.get("LD_PRELOAD", "")
    if not any(name in before for name in ("libomp", "libgomp", "libiomp")):
        folder = Path(torch.__file__).parent
        found = [*(folder.parent / "torch.libs").glob("libgomp*.so*"), *(folder / "lib").glob("libgomp*.so*")]
        os.environ["LD_PRELOAD"] = ":".join(filter(None, (before, *map(str, found[:1]))))


def wait(modules: Sequence[str], tracker: int, told_by: int) -> NoReturn:
    """What an early process runs: load, then do what a spawned process does; end quietly if it is never told."""
    for module in modules:
        import_module(module)
    with suppress(EOFError):
        spawn.spawn_main(pipe_handle=told_by, tracker_fd=tracker)
    raise SystemExit(0)


class EarlyContext(SpawnContext):
    """Processes that are spawned, the first of them from ``early`` if that can be what a new one would be.

    Make it once this process has loaded vLLM too: loading changes variables of its own.
    """

    def __init__(self, early: EarlyProcess) -> None:
        super().__init__()
        self._early = early
        self._environment = dict(os.environ)

    def Process(self, **what: Any) -> SpawnProcess:  # type: ignore[override]
        process = _Process(**what)
        process.take_early = self._take
        return process

    def _take(self) -> EarlyProcess | None:
        names = self._environment.keys() | os.environ.keys()
        changed = {name for name in names if self._environment.get(name) != os.environ.get(name)}
        late = sorted(name for name in changed - READ_WHEN_USED if not name.startswith("VLLM_"))
        if late:
            logger.warning("the engine core loads vLLM once more, with %s as vLLM has set it", ", ".join(late))
            self._early.discard()
        return self._early if self._early.take() else None


class _Process(SpawnProcess):
    take_early: Callable[[], EarlyProcess | None]
    environment: dict[str, str]

    def start(self) -> None:
        self.environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        for name in os.environ.keys() - self.environment.keys():
            del os.environ[name]
        # Only what differs: setting a process's title needs the rest where it is in memory.
        os.environ.update(self.environment.items() - os.environ.items())
        super().run()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "take_early"}

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        early = process_obj.take_early()
        return popen_spawn_posix.Popen(process_obj) if early is None else _TellEarly(process_obj, early)


class _TellEarly(popen_spawn_posix.Popen):
    """With a process that is there already, and so can be given no more file descriptors."""

    def __init__(self, process_obj: SpawnProcess, early: EarlyProcess) -> None:
        self._early = early
        super().__init__(process_obj)

    def duplicate_for_child(self, _fd: int) -> int:
        raise ValueError("a process that was started early can be given no file descriptors")

    def _launch(self, process_obj: SpawnProcess) -> None:
        self.pid, self.sentinel = self._early.pid, self._early.sentinel
        self.finalizer = util.Finalize(self, self._early.close)
        told = io.BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(spawn.get_preparation_data(process_obj.name), told)
            reduction.dump(process_obj, told)
        finally:
            set_spawning_popen(None)
        with open(self._early.pipe, "wb", closefd=False) as pipe:
            pipe.write(told.getbuffer())
