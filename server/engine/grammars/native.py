"""xgrammar's native functions, and the limits of the processes that call them."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import sys
from pathlib import Path
from typing import Any, Final

MAX_SECONDS: Final = 5
"""Of processor time to compile one constraint."""
MAX_MEMORY: Final = 1 << 30
MAX_FOLLOWING: Final = 128 << 20
"""Bytes for what is kept of all requests that a compiled constraint is followed for."""
MAX_MASK_SECONDS: Final = 0.5
"""Of processor time to follow one token and find out what may come next. A step waits for a few milliseconds of it."""
HUNG_SECONDS: Final = 120
"""On the clock, to compile a constraint that gets no processor time: a busy machine ends none before."""
OUT_OF_MEMORY: Final = 3
"""Exit status of a process that reached its limit of memory."""
PR_SET_PDEATHSIG: Final = 1
_INHERITED: Final = re.compile("PATH|HOME|LANG|LC_.*|PYTHON.*|LD_LIBRARY_PATH|TMPDIR")


def load_bindings() -> Any:
    """xgrammar's native functions without its package, which loads torch and transformers for seconds."""
    import importlib.util

    sys.modules["torch"] = None  # type: ignore[assignment] # an ImportError where it is optional
    spec = importlib.util.find_spec("xgrammar")
    if spec is None:
        raise ImportError("xgrammar is not installed")
    sys.modules["xgrammar"] = importlib.util.module_from_spec(spec)
    importlib.import_module("xgrammar.load_binding")
    return importlib.import_module("xgrammar.tvm_ffi_binding._ffi_api")


def environment() -> dict[str, str]:
    """Variables for a process that loads the bindings: no secrets, and one thread, so that it may fork."""
    own = {"OPENBLAS_NUM_THREADS": "1", "TVM_FFI_DISABLE_TORCH_C_DLPACK": "1", "PYTHONSAFEPATH": "1"}
    return {name: value for name, value in os.environ.items() if _INHERITED.fullmatch(name)} | own


def compile_constraint(bindings: Any, tokenizer: Any, kind: str, text: str) -> Any:
    """A compiled grammar; raises what the compiler raises."""
    compiler = bindings.GrammarCompiler(tokenizer, 1, False, -1)
    if kind == "json":
        return compiler.compile_json_schema(text, False, None, (",", ":"), True, None, False)
    if kind == "regex":
        return compiler.compile_regex(text)
    if kind == "structural_tag":
        return compiler.compile_structural_tag(text)
    return compiler.compile_grammar_from_strings(text, "root")


def limit_process() -> None:
    """Give this process, a fork, the limits of compiling: its memory, its time, its rank, and its parent's end."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(5)
    Path("/proc/self/oom_score_adj").write_text("1000")  # where memory is short, it ends before all others
    limit_memory(MAX_MEMORY)
    limit_time(MAX_SECONDS)


def fork() -> tuple[int, int]:
    """Fork this process.

    Returns:
        In the parent the child's id and a descriptor that is readable once it has ended, in the child 0 and -1.

    Raises:
        OSError: no process or no descriptor is left; there is no child then.
    """
    pid = os.fork()
    if pid == 0:
        return 0, -1
    try:
        return pid, os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def beyond_limits(status: int) -> str | None:
    """Which limit a process ended at, by its wait status: ``time``, ``memory``, or None if at none."""
    if os.WIFEXITED(status):
        return "memory" if os.WEXITSTATUS(status) == OUT_OF_MEMORY else None
    ended_by = os.WTERMSIG(status)
    if ended_by == signal.SIGPROF:
        return "time"
    # Native code that gets no memory ends like this.
    return "memory" if ended_by in (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS) else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether native code or Python got no memory."""
    return isinstance(error, MemoryError) or "bad_alloc" in str(error)


def limit_memory(more: int) -> None:
    """Let this process have so many bytes more than it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    least = used + more if most == resource.RLIM_INFINITY else min(used + more, most)
    resource.setrlimit(resource.RLIMIT_AS, (least, least))


def limit_time(processor_seconds: float) -> None:
    """Let the kernel end this process once it has used so much more processor time; 0 for no limit."""
    signal.setitimer(signal.ITIMER_PROF, processor_seconds)
