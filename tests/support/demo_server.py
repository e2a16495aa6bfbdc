"""`flexgate serve --demo` as users start it; needs only the standard library, as clients' environments have no more."""

import os
import secrets
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FLEXGATE = Path(__file__).resolve().parents[2] / ".venv/bin/flexgate"
START_SECONDS = 300


def free_port() -> int:
    """A port that nothing listens on, below those that the system gives to whoever connects meanwhile."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port))
            return port


def await_ok(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a process that was just started answers 200.

    Raises:
        RuntimeError: with the end of its log, if it ends before or takes too long.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                if response.status == 200:
                    return
        except OSError:
            time.sleep(0.3)
    raise RuntimeError(f"{url} did not answer:\n{log.read_text()[-3000:]}")


@contextmanager
def serve_demo(place: Path, *options: str, flexgate: Path = FLEXGATE) -> Iterator[str]:
    """Run the demo with its log (`log`) and state below a folder; yields its URL, and checks that it ends well."""
    port, log = free_port(), place / "log"
    ours = {"FLEXGATE_STATE_DIR": str(place / "state"), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        command = [flexgate, "serve", "--demo", f"--port={port}", *options]
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=place, env=os.environ | ours)
    try:
        await_ok(f"http://127.0.0.1:{port}/ready", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert status == 0, log.read_text()[-2000:]
