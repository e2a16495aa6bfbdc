"""The server that is attacked: its processes are bounded in memory, and it is started again when a body ends it."""

import http.client
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import psutil

from speed.checkpoint import DEMO
from speed.loop.bodies import Body
from speed.loop.trace import Sent
from speed.servers import ADMIN_KEY, KEY, Server, flexgate

TRACING = Path(__file__).with_name("tracing")
RECOVER_SECONDS = 20.0
MOST_BYTES = 5 << 30  # of resident memory in all processes of the server; a good one takes less than 2 GB
LOOK_EVERY = 0.1


class CannotStart(Exception):
    """The server was ended by a body and does not start again."""


class Target:
    """`flexgate serve` with the demo's checkpoint and instruments; use it as a context manager."""

    def __init__(self, directory: Path) -> None:
        self.trace = directory / "trace"
        self.trace.mkdir()
        self._directory = directory
        self._server: Server | None = None
        self._stack = ExitStack()
        self._too_large = False

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def send(self, body: Body, content: bytes, name: str | None = None) -> Sent:
        """Send one body and wait for the whole answer; afterwards the server answers again, if need be a new one."""
        sent = Sent(name or body.name, len(content), time.monotonic())
        try:
            sent.outcome = str(self._request(body, content))
        except TimeoutError:
            sent.outcome = f"no answer within {body.seconds:g} s"
        except (OSError, http.client.HTTPException) as error:
            sent.outcome = f"the connection broke off: {type(error).__name__}"
        if not sent.answered and not self._recovers():
            late, large = f"not ready within {RECOVER_SECONDS:g} s after it", f"memory above {MOST_BYTES >> 30} GiB"
            sent.outcome += f"; {large if self._too_large else late}"
            self._restart(sent)
        return sent

    def settle(self) -> None:
        """Wait until the server answers, after all that it had to do before."""
        if not self._recovers():
            raise CannotStart(f"not ready within {RECOVER_SECONDS:g} s")

    def _restart(self, sent: Sent) -> None:
        self._kill()
        self._stop()
        sent.ended = time.monotonic()
        try:
            self._start()
        except RuntimeError as error:
            raise CannotStart(f"after {sent.body} ({sent.size} bytes): {sent.outcome}: {error}") from error

    def _request(self, body: Body, content: bytes) -> int:
        headers = {"Authorization": f"Bearer {ADMIN_KEY if body.admin else KEY}", "Content-Type": "application/json"}
        path = body.path
        if body.field is None:
            query = content.decode()
            path, content = f"{path}?{query}" if query else path, b""
        with self._connection(body.seconds) as connection:
            connection.request(body.method, path, content or None, headers)
            answer = connection.getresponse()
            time.sleep(body.unread)
            deadline = time.monotonic() + body.seconds
            while answer.read(1 << 20):
                if time.monotonic() > deadline:
                    raise TimeoutError
            return answer.status

    def _recovers(self) -> bool:
        deadline = time.monotonic() + RECOVER_SECONDS
        while time.monotonic() < deadline and not self._too_large:
            with suppress(OSError, http.client.HTTPException), self._connection(2.0) as connection:
                connection.request("GET", "/ready")
                if connection.getresponse().status == 200:
                    return True
            time.sleep(LOOK_EVERY)
        return False

    @contextmanager
    def _connection(self, seconds: float) -> Iterator[http.client.HTTPConnection]:
        assert self._server is not None
        connection = http.client.HTTPConnection(urlsplit(self._server.url).netloc, timeout=seconds)
        try:
            yield connection
        finally:
            connection.close()

    def _start(self) -> None:
        self._too_large = False
        path = os.pathsep.join(filter(None, (str(TRACING), os.environ.get("PYTHONPATH"))))
        environment = {"PYTHONPATH": path, "FLEXGATE_TRACE": str(self.trace)}
        options = (f"--state-dir={self._directory / 'state'}",)
        self._server = self._stack.enter_context(flexgate(DEMO, self._directory, *options, environment=environment))
        ended = threading.Event()
        self._stack.callback(ended.set)
        threading.Thread(target=self._guard, args=(self._server.pid, ended), daemon=True).start()

    def _stop(self) -> None:
        stack, self._stack = self._stack, ExitStack()
        stack.close()

    def _guard(self, pid: int, ended: threading.Event) -> None:
        """Kill a server that takes too much memory of the machine."""
        while not ended.wait(LOOK_EVERY):
            with suppress(psutil.NoSuchProcess):
                if sum(process.memory_info().rss for process in _family(pid)) > MOST_BYTES:
                    self._too_large = True
                    return self._kill()
        return None

    def _kill(self) -> None:
        assert self._server is not None
        with suppress(psutil.NoSuchProcess):
            for process in _family(self._server.pid):
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def _family(pid: int) -> list[psutil.Process]:
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
