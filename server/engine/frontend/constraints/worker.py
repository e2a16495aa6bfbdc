"""The process that compiles constraints: ``python -m flexgate.server.engine.frontend.constraints.worker``.

It loads xgrammar once, without torch, stays at one thread, and forks a child for every constraint. A child has a limit
on its memory and its time; where one is over, or the compiler crashes, that child ends, and with it one request.
It reads jobs on its input until the server closes that, which is how it ends with the server.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import struct
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from flexgate.server.engine.frontend.constraints.errors import compiler_message
from flexgate.server.engine.grammars.native import (
    HUNG_SECONDS,
    MAX_MASK_SECONDS,
    MAX_MEMORY,
    OUT_OF_MEMORY,
    beyond_limits,
    compile_constraint,
    fork,
    is_out_of_memory,
    limit_process,
    limit_time,
    load_bindings,
)

MAX_COMPILED: Final = 64 << 20
"""Bytes of a compiled grammar, which a process of the engine core's keeps while requests have it."""
PROBES: Final = 3
PROBE_TOKENS: Final = 48
PROBE_SECONDS: Final = 1
"""Of processor time for all of them: what is slow later is ended where it is followed."""
LENGTH: Final = struct.Struct(">I")

_CHUNK: Final = 1 << 20


@dataclass(slots=True)
class _Child:
    """A constraint that is being compiled, and the pipe that the answer is written to."""

    job: int
    pid: int
    pipe: int
    deadline: float
    hung: bool = False


def probe(bindings: Any, compiled: Any, vocabulary: int, seed: int) -> str | None:
    """Why this grammar is not to be followed for requests, if so: walks it, and looks at the clock."""
    import numpy as np

    chance, probed = random.Random(seed), time.thread_time()
    mask = np.zeros((1, (vocabulary + 31) // 32), dtype=np.int32)
    for walk in range(PROBES):
        matcher = bindings.GrammarMatcher(compiled, None, False, -1, None)
        for step in range(PROBE_TOKENS):
            mask[:] = -1
            began = time.thread_time()
            matcher.fill_next_token_bitmask(mask, 0, False)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocabulary])
            if not len(allowed):
                return "no answer satisfies it" if step == 0 else None
            token = allowed[0] if walk == 0 else allowed[-1] if walk == 1 else chance.choice(allowed)
            matcher.accept_token(int(token), False)
            ended = time.thread_time()
            if ended - began > MAX_MASK_SECONDS:
                return "what may come next takes too long to find out"
            if ended - probed > PROBE_SECONDS:
                return None
            if matcher.is_terminated():
                break
    return None


def answer_job(bindings: Any, tokenizer: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Nothing, or why the constraint is ``refused``; what is raised is a limit of memory, or a fault of the machine."""
    try:
        compiled = compile_constraint(bindings, tokenizer, job["kind"], job["text"])
        if compiled.memory_size_bytes() > MAX_COMPILED:
            return {"refused": f"compiled, it takes more than {MAX_COMPILED >> 20} MiB"}
        limit_time(PROBE_SECONDS + 2 * MAX_MASK_SECONDS)
        why = probe(bindings, compiled, tokenizer.vocab_size(), seed=job["id"])
    except Exception as error:
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        return {"refused": compiler_message(str(error))}
    return {} if why is None else {"refused": why}


_REFUSED: Final = {
    "time": "it takes too long to compile or to follow",
    "memory": f"it needs more than {MAX_MEMORY >> 20} MiB to compile",
}
"""By the limit that a child ended at."""


class Worker:
    """Jobs from ``source``, answers to ``sink``; both are file descriptors."""

    def __init__(self, source: int, sink: int) -> None:
        self._source, self._sink = source, sink
        self._bindings = load_bindings()
        self._tokenizer: Any = None
        self._children: dict[int, _Child] = {}
        self._read = bytearray()

    def run(self) -> None:
        """Work until the source ends."""
        while True:
            ready, _, _ = select.select([self._source, *self._children], [], [], 0.1 if self._children else None)
            for source in ready:
                if source != self._source:
                    self._finish(source)
                elif not self._take_jobs():
                    return
            self._end_late()

    def stop(self) -> None:
        """End what is being compiled."""
        for child in self._children.values():
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)

    def _take_jobs(self) -> bool:
        chunk = os.read(self._source, _CHUNK)
        self._read += chunk
        while len(self._read) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._read)
            if len(self._read) < LENGTH.size + length:
                break
            message = json.loads(self._read[LENGTH.size : LENGTH.size + length])
            del self._read[: LENGTH.size + length]
            if "tokenizer" in message:
                self._tokenizer = self._bindings.TokenizerInfo.deserialize_json(message["tokenizer"])
            else:
                self._begin(message)
        return bool(chunk)

    def _begin(self, job: dict[str, Any]) -> None:
        try:
            self._fork(job)
        except OSError as error:
            self._answer(job["id"], {"busy": f"nothing is left to begin a process with: {error}"})

    def _fork(self, job: dict[str, Any]) -> None:
        with ExitStack() as opened:
            pipe, tells = os.pipe()
            opened.callback(os.close, pipe)
            opened.callback(os.close, tells)
            pid, ended = fork()
            if pid == 0:
                self._compile(job, tells)
            opened.pop_all()
        os.close(tells)
        self._children[ended] = _Child(job["id"], pid, pipe, time.monotonic() + HUNG_SECONDS)

    def _compile(self, job: dict[str, Any], tells: int) -> NoReturn:
        """What a child does."""
        status = 1
        try:
            limit_process()
            os.close(self._source)
            os.close(self._sink)
            answer = json.dumps(answer_job(self._bindings, self._tokenizer, job)).encode()
            os.write(tells, answer)
            status = 0
        except Exception as error:
            status = OUT_OF_MEMORY if is_out_of_memory(error) else 1
        finally:
            os._exit(status)

    def _finish(self, ended: int) -> None:
        """Answer for a child that has ended, which left its own answer in the pipe, if it has one."""
        child = self._children.pop(ended)
        _, status = os.waitpid(child.pid, 0)
        output = os.read(child.pipe, _CHUNK)
        os.close(child.pipe)
        os.close(ended)
        limit = beyond_limits(status)
        answer = (
            {"busy": "the process that compiled a constraint ended"} if limit is None else {"refused": _REFUSED[limit]}
        )
        if child.hung:
            answer = {"busy": f"a constraint was not compiled within {HUNG_SECONDS} s"}
        with suppress(ValueError):
            answer = json.loads(output)
        self._answer(child.job, answer)

    def _answer(self, job: int, answer: dict[str, Any]) -> None:
        message = json.dumps({**answer, "id": job}).encode()
        with open(self._sink, "wb", closefd=False) as sink:
            sink.write(LENGTH.pack(len(message)) + message)

    def _end_late(self) -> None:
        now = time.monotonic()
        for child in self._children.values():
            if child.deadline < now:
                child.hung = True
                with suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)


def main() -> None:
    """Work for the server at the other end of this process's input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's
    sink = os.dup(1)
    os.dup2(2, 1)  # what the compiler prints is no answer
    worker = Worker(0, sink)
    with suppress(BrokenPipeError):
        worker.run()
    worker.stop()
    os._exit(0)


if __name__ == "__main__":
    main()
