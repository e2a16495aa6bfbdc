"""The engine core's process, begun before vLLM asks for it, so that it loads vLLM while this process does.

vLLM spawns its engine core once it knows its whole configuration. What was spawned then loads all of vLLM once more,
while this process waits. What a spawned process does first is the same whatever it will run: here it does that early,
and is told what to run later, through the pipe that a spawned process is always told through.
"""

import io
import json
import logging
import logging.config
import os
import select
import signal
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import popen_spawn_posix, reduction, resource_tracker, spawn, util
from multiprocessing.context import SpawnContext, SpawnProcess, set_spawning_popen
from pathlib import Path
from typing import Any, Final, Self

from flexgate.server.engine.frontend.leaving import leaving

logger = logging.getLogger(__name__)

READ_WHEN_USED: Final = frozenset(
    {
        "LOCAL_WORLD_SIZE",
        "NUMEXPR_MAX_THREADS",
        "VLLM_DISABLE_SHARED_EXPERTS_STREAM",
        "VLLM_SSM_CONV_STATE_LAYOUT",
        "VLLM_WORKER_MULTIPROC_METHOD",
    }
)
"""Variables that vLLM sets for its processes and none of them reads as it starts or loads what we install."""


class CannotBeTold(Exception):
    """An early process cannot be used; the message says why."""


class EarlyProcess:
    """A process that loads modules and waits for its program; without one it ends with its ``with`` block.

    Attributes:
        waiting: whether it can still be told.
        pid: of the process.
        sentinel: a file descriptor, ready to read once the process has ended.
        pipe: the file descriptor through which it is told; the process follows its end.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        set_for_cpu()
        self.sentinel, kept_open = os.pipe()
        start_fd, self.pipe = os.pipe()
        tracker = resource_tracker.getfd()
        if tracker is None:
            raise RuntimeError("multiprocessing's resource tracker does not run")
        paths = spawn.get_preparation_data("")["sys_path"]
        executable, *options = spawn.get_command_line()
        program = f"import sys; sys.path[:] = {paths}; from {__name__} import wait; "
        options[options.index("-c") + 1] = f"{program}wait({tuple(modules)}, {tracker}, {start_fd})"
        command = [os.fsencode(word) for word in (executable, *options)]
        self.pid = util.spawnv_passfds(command[0], command, [tracker, kept_open, start_fd])
        os.close(kept_open)
        os.close(start_fd)
        self.waiting = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def tell(self, what: bytes) -> None:
        """Start the program; the caller then owns the process.

        Raises:
            CannotBeTold: it has ended.
        """
        try:
            with open(self.pipe, "wb", closefd=False) as pipe:
                pipe.write(what)
        except BrokenPipeError as error:
            raise CannotBeTold("what was begun early has ended") from error
        self.waiting = False

    def discard(self) -> None:
        """End the process, unless its program was started."""
        if self.waiting:
            self.waiting = False
            with suppress(ProcessLookupError, ChildProcessError):  # where SIGCHLD is ignored
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
            self.close_pipes()

    def close_pipes(self) -> None:
        """Close this side's file descriptors."""
        os.close(self.sentinel)
        os.close(self.pipe)


def modules_of_core(ranks: int) -> tuple[str, ...]:
    """What an engine core on CPU imports: one rank usually runs in it, more have processes of their own."""
    core = ("vllm.v1.engine.core",)
    return (*core, "vllm.v1.worker.cpu_worker", "flexgate.server.engine.worker.worker") if ranks == 1 else core


def set_for_cpu() -> None:
    """Set what vLLM has its processes on CPU read as they start (`CpuPlatform.check_and_update_config`)."""
    import torch

    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    os.environ["TORCHINDUCTOR_CPP_DYNAMIC_THREADS"] = "1"
    vllm = find_spec("vllm")
    folders = [] if vllm is None else list(vllm.submodule_search_locations or ())
    libraries = preloaded(os.environ.get("LD_PRELOAD", ""), Path(torch.__file__).parent, *map(Path, folders))
    if libraries:
        os.environ["LD_PRELOAD"] = libraries


def preloaded(before: str, torch: Path, *vllm: Path) -> str:
    """``LD_PRELOAD`` as vLLM sets it: with torch's OpenMP, and vLLM's allocator where it comes with one."""
    if not any(name in before for name in ("libomp", "libgomp", "libiomp")):
        openmp = [*(torch.parent / "torch.libs").glob("libgomp*.so*"), *(torch / "lib").glob("libgomp*.so*")]
        before = ":".join(filter(None, (before, *map(str, openmp[:1]))))
    if "libtcmalloc" not in before:
        patterns = ("libtcmalloc_minimal*.so*", "libtcmalloc.so*")
        allocators = [found for pattern in patterns for folder in vllm for found in (folder / "libs").glob(pattern)]
        before = ":".join(filter(None, (*map(str, allocators[:1]), before)))
    return before


def wait(modules: Sequence[str], tracker: int, start_fd: int) -> None:
    """What an early process runs: load, then do what a spawned process does; end quietly if no program comes."""
    with leaving():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's until the engine core takes it
        _configure_logging()
        with suppress(ImportError):  # what it is told to run finds out, and says so
            for module in modules:
                import_module(module)
        poll = select.poll()
        poll.register(start_fd, select.POLLIN)
        if any(event & select.POLLIN for _, event in poll.poll()):
            spawn.spawn_main(pipe_handle=start_fd, tracker_fd=tracker)


def _configure_logging() -> None:
    """Log as vLLM will, already while it loads: vLLM configures logging only once it has its whole configuration."""
    if path := os.environ.get("VLLM_LOGGING_CONFIG_PATH"):
        logging.config.dictConfig(json.loads(Path(path).read_text()))


class EarlyContext(SpawnContext):
    """Processes that are spawned, the first of them from ``early`` if that can be what a new one would be.

    Make it once this process has loaded vLLM too: loading sets variables, the same ones in every process.
    """

    def __init__(self, early: EarlyProcess) -> None:
        super().__init__()
        self.early = early
        self.environment = dict(os.environ)

    def Process(self, **what: Any) -> SpawnProcess:  # type: ignore[override]
        process = _Process(**what)
        process.context = self
        return process


class _Process(SpawnProcess):
    context: EarlyContext
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
        return {name: value for name, value in vars(self).items() if name != "context"}

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        early = process_obj.context.early
        if early.waiting:
            try:
                return _TellEarly(process_obj)
            except CannotBeTold as error:
                logger.warning("the start takes longer: the engine process was started again: %s", error)
                early.discard()
        return popen_spawn_posix.Popen(process_obj)


class _TellEarly(popen_spawn_posix.Popen):
    """With a process that is there already."""

    def duplicate_for_child(self, _fd: int) -> int:
        raise CannotBeTold("an early process cannot be given file descriptors")

    def _launch(self, process_obj: Any) -> None:
        context: EarlyContext = process_obj.context
        now, before = process_obj.environment, context.environment
        changed = {name for name in now.keys() | before.keys() if now.get(name) != before.get(name)}
        if late := sorted(changed - READ_WHEN_USED):
            raise CannotBeTold(f"{', '.join(late)} changed during the start")
        what = io.BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(spawn.get_preparation_data(process_obj.name), what)
            reduction.dump(process_obj, what)
        finally:
            set_spawning_popen(None)
        context.early.tell(what.getvalue())
        self.pid, self.sentinel = context.early.pid, context.early.sentinel
        self.finalizer = util.Finalize(self, context.early.close_pipes)
