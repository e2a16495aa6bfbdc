"""The process that follows grammars for an engine core: ``python -m flexgate.server.engine.grammars.follow FD``.

It loads xgrammar once and forks a child for each constraint of running requests. The child compiles it, as it was tried
before, and makes the masks of its requests. The kernel ends a child that is late, which nothing within it could: native
code cannot be interrupted. This process then tells the engine core that it was the limit. It reads jobs from the socket
FD until the engine core closes that.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from flexgate.server.engine.grammars.native import (
    HUNG_SECONDS,
    MAX_FOLLOWING,
    MAX_MASK_SECONDS,
    OUT_OF_MEMORY,
    beyond_limits,
    compile_constraint,
    fork,
    is_out_of_memory,
    limit_memory,
    limit_process,
    limit_time,
    load_bindings,
)
from flexgate.server.engine.protocol.masks import (
    ADVANCE,
    BEYOND_LIMITS,
    CLOSE,
    COMPILED,
    ENDED,
    MAX_PACKET,
    REFUSED,
    pack,
    pack_mask,
    unpack,
)

MAX_AT_ONCE: Final = 2
"""Constraints that are compiled at once, one of each tenant."""
MAX_PROCESSES: Final = 64
MAX_OF_TENANT: Final = 16
"""Children, in all and of one tenant; a further constraint waits for one to end."""
QUICK_SECONDS: Final = 0.01
MAX_NICE: Final = 19
"""For a process that has been slower than that once: it has what processor time the steps leave."""
LENGTH: Final = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Child:
    """A process that follows a constraint, and what it is reached by."""

    pid: int
    tenant: str
    link: socket.socket


class Forker:
    """Jobs from ``control``, each with the socket by which the engine core reaches the child that it is for.

    A byte is sent back for each job that is taken. A job that no descriptor or process is left for ends alone: its
    socket is closed. A socket that the engine core closes ends its job or its child.
    """

    def __init__(self, control: socket.socket, bindings: Any, tokenizer: Any) -> None:
        self._control = control
        self._bindings, self._tokenizer = bindings, tokenizer
        self._waiting: dict[str, dict[int, tuple[dict[str, str], socket.socket]]] = {}
        self._compiling: dict[int, tuple[Child, float]] = {}
        self._children: dict[int, Child] = {}
        self._untold: dict[int, socket.socket] = {}
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)

    def run(self) -> None:
        """Work until the engine core is gone."""
        while True:
            for source, _ in self._poll.poll(1000 if self._compiling else None):  # `control` first, which was first
                if source == self._control.fileno():
                    if not self._take_job():
                        return
                elif source in self._compiling:
                    self._poll.unregister(source)
                    os.close(source)
                    del self._compiling[source]
                elif source in self._children:
                    self._bury(source)
                elif source in self._untold:
                    self._tell(source)
                else:
                    self._leave(source)
            self._end_hung()
            self._begin_next()

    def _take_job(self) -> bool:
        head, descriptors, _, _ = socket.recv_fds(self._control, LENGTH.size, 1, socket.MSG_WAITALL)
        if len(head) < LENGTH.size:
            return False
        (length,) = LENGTH.unpack(head)
        job = json.loads(self._control.recv(length, socket.MSG_WAITALL))
        for descriptor in descriptors:  # none, where this process may have no more
            self._poll.register(descriptor, 0)  # which tells when the engine core closes its end
            self._waiting.setdefault(job["tenant"], {})[descriptor] = job, socket.socket(fileno=descriptor)
        self._control.send(b"\0")
        return True

    def _leave(self, descriptor: int) -> None:
        """End the job or the child whose requests are all gone."""
        for tenant, jobs in self._waiting.items():
            if descriptor in jobs:
                self._close(self._take(tenant, descriptor)[1])
                return
        for child in self._children.values():
            if child.link.fileno() == descriptor:
                self._poll.unregister(descriptor)
                os.kill(child.pid, signal.SIGKILL)

    def _close(self, link: socket.socket) -> None:
        with suppress(KeyError):
            self._poll.unregister(link)
        link.close()

    def _take(self, tenant: str, descriptor: int) -> tuple[dict[str, str], socket.socket]:
        """Take a job from those that wait, and put its tenant behind all others."""
        jobs = self._waiting.pop(tenant)
        taken = jobs.pop(descriptor)
        if jobs:
            self._waiting[tenant] = jobs
        return taken

    def _begin_next(self) -> None:
        """Fork for as many jobs as there may be children now, of the tenants in turn."""
        while len(self._compiling) < MAX_AT_ONCE and len(self._children) < MAX_PROCESSES:
            tenant = next(filter(self._may_begin, self._waiting), None)
            if tenant is None:
                return
            job, link = self._take(tenant, next(iter(self._waiting[tenant])))
            try:
                self._fork(job, link)
            except OSError:
                self._close(link)

    def _may_begin(self, tenant: str) -> bool:
        if any(child.tenant == tenant for child, _ in self._compiling.values()):
            return False
        return sum(child.tenant == tenant for child in self._children.values()) < MAX_OF_TENANT

    def _fork(self, job: dict[str, str], link: socket.socket) -> None:
        """Fork a child, with a pipe that it closes once it has compiled; raises `OSError`, and there is none then."""
        with ExitStack() as opened:
            compiled, compiles = os.pipe()
            opened.callback(os.close, compiled)
            opened.callback(os.close, compiles)
            pid, ended = fork()
            if pid == 0:
                self._follow(job, link, compiles)
            opened.pop_all()
        os.close(compiles)
        child = self._children[ended] = Child(pid, job["tenant"], link)
        self._compiling[compiled] = child, time.monotonic() + HUNG_SECONDS
        for descriptor in (compiled, ended):
            self._poll.register(descriptor, select.POLLIN)

    def _bury(self, ended: int) -> None:
        """Close the socket of a child that has ended. If it ended at a limit, report that to the engine core first."""
        child = self._children.pop(ended)
        self._poll.unregister(ended)
        os.close(ended)
        _, status = os.waitpid(child.pid, 0)
        if beyond_limits(status) is None:
            self._close(child.link)
        else:  # the socket may be full of masks
            self._untold[child.link.fileno()] = child.link
            self._poll.register(child.link, select.POLLOUT)

    def _tell(self, descriptor: int) -> None:
        """Tell the engine core that a child ended at a limit, now that its socket has room."""
        link = self._untold.pop(descriptor)
        with suppress(OSError):  # the engine core may have closed it
            link.send(pack(BEYOND_LIMITS, 0), socket.MSG_DONTWAIT)
        self._close(link)

    def _end_hung(self) -> None:
        now = time.monotonic()
        for child, deadline in self._compiling.values():
            if deadline < now and child in self._children.values():
                os.kill(child.pid, signal.SIGKILL)

    def _follow(self, job: dict[str, str], link: socket.socket, compiles: int) -> NoReturn:
        """What a child does."""
        status = 1
        try:
            limit_process()
            waiting = [other for jobs in self._waiting.values() for _, other in jobs.values()]
            for other in (*waiting, *self._untold.values(), *(child.link for child in self._children.values())):
                other.close()  # whose end the engine core would not see while it is open here
            self._control.close()
            compiled = compile_constraint(self._bindings, self._tokenizer, job["kind"], job["text"])
            limit_time(0)
            limit_memory(MAX_FOLLOWING)
            os.close(compiles)
            Follower(self._bindings, compiled, self._tokenizer.vocab_size(), link).run()
            status = 0
        except Exception as error:
            status = OUT_OF_MEMORY if is_out_of_memory(error) else 1
        finally:
            os._exit(status)


class Follower:
    """Requests that have the same constraint, by number."""

    def __init__(self, bindings: Any, compiled: Any, vocabulary: int, link: socket.socket) -> None:
        import numpy as np

        self._bindings, self._compiled, self._link = bindings, compiled, link
        self._matchers: dict[int, Any] = {}
        self._quick = True
        self._mask = np.zeros((1, (vocabulary + 31) // 32), dtype=np.int32)

    def run(self) -> None:
        """Work until the engine core closes the socket."""
        self._link.send(pack(COMPILED, 0, [self._compiled.memory_size_bytes() >> 10]))
        while packet := self._link.recv(MAX_PACKET):
            what, request, values = unpack(packet)
            if what == CLOSE:
                self._matchers.pop(request, None)
                continue
            limit_time(MAX_MASK_SECONDS)
            began = time.process_time()
            answer = self._answer(what, request, list(values))
            limit_time(0)
            self._link.send(answer)
            if self._quick and time.process_time() - began > QUICK_SECONDS:
                self._quick = False
                os.nice(MAX_NICE)

    def _answer(self, what: int, request: int, tokens: list[int]) -> bytes:
        if what == ADVANCE:
            matcher = self._matchers[request]
            if not all(matcher.is_terminated() or matcher.accept_token(token, False) for token in tokens):
                return pack(REFUSED, request)
        else:
            matcher = self._bindings.GrammarMatcher(self._compiled, tokens or None, False, -1, None)
            self._matchers[request] = matcher
        if matcher.is_terminated():
            return pack(ENDED, request)
        self._mask[:] = -1
        matcher.fill_next_token_bitmask(self._mask, 0, False)
        return pack_mask(request, self._mask.tobytes())


def main() -> None:
    """Work for the engine core at the other end of the socket, whose tokenizer is this process's input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's
    control = socket.socket(fileno=int(sys.argv[1]))
    bindings = load_bindings()
    import numpy as _before_the_forks  # noqa: F401

    tokenizer = bindings.TokenizerInfo.deserialize_json(sys.stdin.read())
    os.dup2(2, 1)  # what the compiler prints
    gc.freeze()  # what is never freed need not be copied for each child
    Forker(control, bindings, tokenizer).run()
    os._exit(0)


if __name__ == "__main__":
    main()
