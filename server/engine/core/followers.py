"""The processes that follow grammars, seen from their engine core, which sends requests and polls for replies.

A process that is late ends, and its own requests with it; others go on.
"""

import json
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from array import array
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from itertools import count
from typing import Any, Final, Protocol
from weakref import finalize, ref

from flexgate.server.engine.grammars.follow import LENGTH, MAX_OF_TENANT, MAX_PROCESSES
from flexgate.server.engine.grammars.native import environment
from flexgate.server.engine.protocol.endings import CONSTRAINT_FAILED, CONSTRAINT_SLOW, CONSTRAINT_UNAVAILABLE
from flexgate.server.engine.protocol.masks import (
    ADVANCE,
    BEYOND_LIMITS,
    CLOSE,
    COMPILED,
    ENDED,
    MASK,
    MAX_PACKET,
    OPEN,
    REFUSED,
    pack,
    unpack,
)

MAX_WAITING: Final = 64
"""Of one tenant's constraints that are not compiled yet."""
MAX_KEPT: Final = 32
MAX_KEPT_KIB: Final = 256 << 10
"""Of processes that no request needs any more, and of the grammars in them."""
MAX_PACKETS: Final = 256
"""Taken at once from one process: about as many as its socket holds, however fast it sends more."""
HUNG_SECONDS: Final = 30
"""On the clock, for a process that the machine gives no processor time."""
UNCOMPILED_SECONDS: Final = 150
"""On the clock, for a constraint to have its turn and be compiled."""


class TenantBusy(Exception):
    """Too many constraints of the tenant wait to be compiled."""


class Followed(Protocol):
    """A request's grammar, as its process tells of it."""

    ready: bool

    def masked(self, words: "array[int]") -> None:
        """Take what may come next."""

    def ended(self) -> None:
        """The answer is complete."""

    def failed(self, reason: str) -> None:
        """No mask will come."""


class Follower:
    """One constraint's process."""

    def __init__(self, tenant: str, link: socket.socket, mask_words: int) -> None:
        self.tenant, self.link = tenant, link
        self._mask_words = mask_words
        self.kib = 0
        self.alive = True
        self.compiled = False
        self._ended_by = CONSTRAINT_UNAVAILABLE
        self.followed: dict[int, ref[Followed]] = {}
        self._asked: dict[int, float] = {}
        self._unsent: OrderedDict[int, bytes] = OrderedDict()  # by request, which has one question at a time
        self._heard = 0.0
        self._numbers = count(1)

    @property
    def owes(self) -> bool:
        """Whether a reply is outstanding."""
        return self.alive and bool(self._asked)

    def open(self, grammar: Followed, stops: Iterable[int]) -> int:
        """Have it follow for one more request, from the next `send`; returns the request's number."""
        number = next(self._numbers)
        self.followed[number] = ref(grammar)
        self._ask(OPEN, number, stops)
        return number

    def advance(self, number: int, tokens: Iterable[int]) -> None:
        """Tell it what was sampled."""
        self._ask(ADVANCE, number, tokens)
        self.send()

    def close(self, number: int) -> None:
        """Have it forget a request, from the next `send`."""
        self.followed.pop(number, None)
        self._asked.pop(number, None)
        unopened = not self.compiled and self._unsent.pop(number, None) is not None
        if self.alive and not unopened:
            self._unsent[number] = pack(CLOSE, number)

    def send(self) -> None:
        """Send what it has room for: nothing before it has compiled, when it does not read. Of one thread alone."""
        while self._unsent and self.compiled and self.alive:
            try:
                number, packet = self._unsent.popitem(last=False)
            except KeyError:
                return
            try:
                self.link.send(packet)
            except ConnectionError:  # it has ended, and may have said why
                self.receive()
            except OSError:  # its socket is full
                self._unsent.setdefault(number, packet)
                self._unsent.move_to_end(number, last=False)
                return

    def receive(self) -> None:
        """Take what it has sent; end it if that is malformed."""
        for _ in range(MAX_PACKETS):
            if not self.alive:
                return
            try:
                packet = self.link.recv(MAX_PACKET)
            except BlockingIOError:
                break
            except ConnectionResetError:  # reported once, where it ended with unread packets; what it sent comes next
                continue
            except OSError:
                packet = b""
            try:
                self._take(*unpack(packet))
                self._heard = time.monotonic()
            except (ValueError, IndexError):  # of no whole number of integers, or too few: nothing, where it has ended
                self.end()

    def end_if_hung(self) -> None:
        """End it if a reply is overdue: nothing was heard for too long, of its masks or of its being compiled."""
        asked = list(self._asked.values())
        seconds = HUNG_SECONDS if self.compiled else UNCOMPILED_SECONDS
        if asked and time.monotonic() - max(min(asked), self._heard) > seconds:
            self.end()

    def end(self) -> None:
        """Close its socket. It ends when it notices, if it has not yet."""
        self.alive, self.kib = False, 0
        self.link.close()
        for followed in list(self.followed.values()):  # at once: other threads add to it
            if (grammar := followed()) is not None:
                grammar.failed(self._ended_by)

    def _ask(self, what: int, number: int, values: Iterable[int]) -> None:
        self._unsent[number] = pack(what, number, values)
        self._asked[number] = time.monotonic()
        if not self.alive:
            self.end()

    def _take(self, what: int, number: int, values: Any) -> None:
        if what == BEYOND_LIMITS:
            self._ended_by = CONSTRAINT_SLOW
            self.end()
            return
        if what == COMPILED:
            self.kib = values[0]
            self.compiled = True
            return
        if what == MASK and len(values) != self._mask_words:
            raise ValueError("a mask of another vocabulary")
        self._asked.pop(number, None)
        followed = self.followed.get(number)
        grammar = None if followed is None else followed()
        if grammar is None:
            return
        if what == MASK:
            grammar.masked(values)
        elif what == ENDED:
            grammar.ended()
        elif what == REFUSED:
            grammar.failed(CONSTRAINT_FAILED)


class Followers:
    """All processes of an engine core, by constraint; the first one begins them, after :meth:`start`.

    Any thread may `follow`; the step's thread alone may `collect`. A grammar that is dropped runs `_leave` on whichever
    thread drops it, even one that holds the lock: it waits for no lock, and leaves the rest to the next `collect`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokenizer = ""
        self._mask_words = 0
        self._forker: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._untaken, self._taken_at = 0, 0.0  # jobs sent and not taken yet, and since when none was taken
        self._all: OrderedDict[str, Follower] = OrderedDict()
        self._listed: tuple[Follower, ...] = ()  # for the steps, which wait for no lock
        self._left = False

    def start(self, tokenizer: str, vocabulary: int) -> None:
        """Prepare for constraints over a tokenizer.

        Args:
            tokenizer: xgrammar's serialised `TokenizerInfo`.
            vocabulary: tokens that it has, and a mask has bits for.
        """
        self._tokenizer, self._mask_words = tokenizer, (vocabulary + 31) // 32

    def _begin_forker(self) -> None:
        control, theirs = socket.socketpair()
        control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", HUNG_SECONDS, 0))
        with theirs, os.fdopen(os.memfd_create("tokenizer"), "w+") as tokenizer:
            tokenizer.write(self._tokenizer)
            tokenizer.seek(0)
            self._forker = subprocess.Popen(
                [sys.executable, "-m", "flexgate.server.engine.grammars.follow", str(theirs.fileno())],
                stdin=tokenizer,
                env=environment(),
                pass_fds=[theirs.fileno()],
            )
        self._control, self._untaken = control, 0

    def stop(self) -> None:
        """End them."""
        if self._forker is not None:
            self._kill_forker(self._forker)
        if self._control is not None:
            self._control.close()
        for follower in self._listed:
            follower.end()

    def follow(self, grammar: Followed, name: str, job: dict[str, str], stops: Iterable[int]) -> tuple[Follower, int]:
        """Have the constraint of that name followed until ``grammar`` is dropped; safe from any thread.

        Returns:
            Its process, a new one where none is alive, and the request's number there.

        Raises:
            TenantBusy: it needs a new one, and too many of its tenant's wait to be compiled.
            OSError: it needs a new one, and no descriptor or process is left for it.
        """
        with self._lock:
            follower = self._all.get(name)
            if follower is not None and not follower.followed:
                follower.receive()  # it may have ended, unneeded
            if follower is None or not follower.alive:
                follower = self._all[name] = self._begin(job)
            self._all.move_to_end(name)
            number = follower.open(grammar, stops)
            finalize(grammar, self._leave, follower, number).atexit = False
            self._end_unneeded()
            return follower, number

    def collect(self, wanted: Collection[Followed], seconds: float) -> float:
        """Take what was sent, and wait so long until every grammar of ``wanted`` is ready; returns the wait."""
        self._tidy_up()
        began, waited = time.monotonic(), 0.0
        for follower in self._listed:
            follower.send()
        while True:
            owing = [follower for follower in self._listed if follower.owes]
            left = 0.0 if all(grammar.ready for grammar in wanted) else max(0.0, seconds - waited)
            for follower in _readable(owing, left):
                follower.receive()
                follower.send()
            waited = time.monotonic() - began
            if left == 0.0:
                break
        for follower in owing:
            follower.end_if_hung()
        return waited

    def _leave(self, follower: Follower, number: int) -> None:
        """Forget a request that is gone; runs wherever its grammar is dropped, even within `follow`."""
        follower.close(number)
        if not follower.followed:
            self._left = True
            self._tidy_up()

    def _tidy_up(self) -> None:
        """End what is unneeded since requests have left, now or in a later step: no step waits for a lock."""
        if self._left and self._lock.acquire(blocking=False):
            try:
                self._left = False
                self._end_unneeded()
            finally:
                self._lock.release()

    def _begin(self, job: dict[str, str]) -> Follower:
        tenant = job["tenant"]
        if sum(one.tenant == tenant and one.alive and not one.compiled for one in self._all.values()) >= MAX_WAITING:
            raise TenantBusy
        if not self._forker_works():
            self._begin_forker()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            self._send_job(json.dumps(job).encode(), theirs)
        return Follower(tenant, ours, self._mask_words)

    def _forker_works(self) -> bool:
        """Whether the process that forks is alive and takes jobs; one that has taken none for too long is killed."""
        if self._forker is None or self._control is None or self._forker.poll() is not None:
            return False
        now = time.monotonic()
        with suppress(OSError):
            if taken := len(self._control.recv(MAX_PACKET, socket.MSG_DONTWAIT)):
                self._untaken, self._taken_at = self._untaken - taken, now
        if self._untaken > 0 and now - self._taken_at > HUNG_SECONDS:
            self._kill_forker(self._forker)
            return False
        return True

    def _kill_forker(self, forker: "subprocess.Popen[bytes]") -> None:
        forker.kill()  # and with it its children, and what it was given
        forker.wait()

    def _send_job(self, message: bytes, link: socket.socket) -> None:
        """Give the process that forks a job; one that does not take it whole is killed."""
        if self._control is None or self._forker is None:
            return
        if self._untaken == 0:
            self._taken_at = time.monotonic()
        self._untaken += 1
        try:
            socket.send_fds(self._control, [LENGTH.pack(len(message))], [link.fileno()])
            self._control.sendall(message)
        except OSError:
            self._kill_forker(self._forker)

    def _end_unneeded(self) -> None:
        """End what no request needs and is not compiled, or is more than is kept, or in the way of what waits."""
        for name, follower in list(self._all.items()):
            if not follower.followed and not follower.compiled:
                follower.receive()  # it may have been compiled meanwhile
                if not follower.compiled:
                    self._all.pop(name).end()
        while (unneeded := self._unneeded()) is not None:
            self._all.pop(unneeded).end()
        self._listed = tuple(self._all.values())

    def _unneeded(self) -> str | None:
        """The process to end next, if one is: of the idle ones, which no request follows, by the first rule that fits.

        - Its tenant has more processes than may run: the oldest of these.
        - More are kept, or want to run, than may: the oldest of the tenant that keeps most.
        - Their grammars take more memory than is kept: the oldest of the tenant whose take most.
        """
        idle = {name: follower for name, follower in self._all.items() if not follower.followed}
        if not idle:
            return None
        of_tenant = Counter(follower.tenant for follower in self._all.values() if follower.alive)
        for name, follower in idle.items():
            if of_tenant[follower.tenant] > MAX_OF_TENANT:
                return name
        if len(idle) >= MAX_KEPT or _wanting(of_tenant) > MAX_PROCESSES:
            return _oldest_of_most({name: (follower.tenant, 1) for name, follower in idle.items()})
        if sum(follower.kib for follower in idle.values()) > MAX_KEPT_KIB:
            return _oldest_of_most({name: (follower.tenant, follower.kib) for name, follower in idle.items()})
        return None


def _wanting(of_tenant: Mapping[str, int]) -> int:
    """How many processes run or want to; what a tenant has beyond its bound waits for its own to end."""
    return sum(min(count, MAX_OF_TENANT) for count in of_tenant.values())


def _oldest_of_most(kept: Mapping[str, tuple[str, int]]) -> str:
    """The first process of the tenant whose processes are the largest together; `kept` has tenant and size of each."""
    sizes: Counter[str] = Counter()
    for tenant, size in kept.values():
        sizes[tenant] += size
    [(most, _)] = sizes.most_common(1)
    return next(name for name, (tenant, _) in kept.items() if tenant == most)


def _readable(owing: list[Follower], seconds: float) -> list[Follower]:
    """Those that have sent something, or have ended; waits so long for the first."""
    links = {follower.link.fileno(): follower for follower in owing}
    links.pop(-1, None)  # ended meanwhile
    poll = select.poll()
    for descriptor in links:
        poll.register(descriptor, select.POLLIN)
    return [links[descriptor] for descriptor, _ in poll.poll(seconds * 1000)] if links else []
