"""The engine dies with a prompt in it: clients are told, nothing is written, nothing stays behind."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import live_server
import psutil
import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CANARY = "marzipan-okapi-5519"
BODY = {"max_tokens": 900, "ignore_eos": True, "stop": [CANARY], "user": CANARY}
PROMPT = {"prompt": f"the {CANARY} the", **BODY}
CHAT = {"messages": [{"role": "user", "content": CANARY}], "stream": True, **BODY}

# Read by every Python process below the server: raises in the main thread of the one whose id a file names.
RAISE_WHEN_TOLD = """
import ctypes, os, threading, time

def wait(path):
    while True:
        time.sleep(0.05)
        if os.path.exists(path) and open(path).read() == str(os.getpid()):
            main = ctypes.c_ulong(threading.main_thread().ident)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(RuntimeError))
            return

threading.Thread(target=wait, args=(os.environ["CRASH_FILE"],), daemon=True).start()
"""


def engine_core(family: list[psutil.Process]) -> psutil.Process:
    (core,) = (p for p in family if "EngineCore" in " ".join((p.name(), *p.cmdline())))
    return core


def worker(family: list[psutil.Process]) -> psutil.Process:
    (one, *_) = (p for p in family if "Worker" in " ".join((p.name(), *p.cmdline())))
    return one


def kill_core(family: list[psutil.Process], _file: Path) -> None:
    engine_core(family).send_signal(signal.SIGKILL)


def abort_core(family: list[psutil.Process], _file: Path) -> None:
    engine_core(family).send_signal(signal.SIGABRT)


def kill_worker(family: list[psutil.Process], _file: Path) -> None:
    worker(family).send_signal(signal.SIGKILL)


def raise_in_core(family: list[psutil.Process], file: Path) -> None:
    file.write_text(str(engine_core(family).pid))


def halt_core(family: list[psutil.Process], _file: Path) -> None:
    engine_core(family).send_signal(signal.SIGSTOP)


CRASHES: dict[str, Callable[[list[psutil.Process], Path], None]] = {
    "core-killed": kill_core,
    "core-aborted": abort_core,
    "worker-killed": kill_worker,
    "exception-in-core": raise_in_core,
    "core-halted": halt_core,
}


@pytest.mark.sliced(2)
@pytest.mark.parametrize("crash", CRASHES.values(), ids=CRASHES.keys())
def test_a_crash_tells_clients_and_leaves_no_word_of_a_prompt(
    crash: Callable[[list[psutil.Process], Path], None],
    text_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(RAISE_WHEN_TOLD)
    monkeypatch.setenv("CRASH_FILE", str(tmp_path / "crash"))
    monkeypatch.setenv("PYTHONPATH", str(hooks), prepend=os.pathsep)
    if crash is halt_core:
        monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "5")
    ranks = 2 if crash is kill_worker else 1  # one rank has no process of its own beside the engine core
    running = live_server.start(text_checkpoint, tmp_path, f"--tensor-parallel-size={ranks}")
    family = live_server.family(running)
    answers: dict[str, httpx.Response] = {}

    def ask(path: str, body: dict[str, Any]) -> None:
        with running.client() as http:
            answers[path] = http.post(path, json=body)

    asking = [
        threading.Thread(target=ask, args=request)
        for request in (("/v1/completions", PROMPT), ("/v1/chat/completions", CHAT))
    ]
    for thread in asking:
        thread.start()
    await_running(running)
    crash(family, tmp_path / "crash")
    for thread in asking:
        thread.join(60)

    plain, stream = answers["/v1/completions"], answers["/v1/chat/completions"]
    assert plain.status_code == 500
    assert_openai_error(plain.json())
    assert_openai_error(json.loads(stream.text.strip().split("\n\n")[-2].removeprefix("data: ")))
    assert running.process.wait(60) == 1
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path


def await_running(running: Any) -> None:
    """Until both requests are in the engine; their prompt is in no metric."""
    with running.client("auditor") as http:
        for _ in range(200):
            metrics = http.get("/metrics").text
            assert CANARY not in metrics
            if re.search(r"^vllm:num_requests_running{[^}]*} 2\.0$", metrics, re.MULTILINE):
                return
            time.sleep(0.02)
    raise AssertionError("the requests never ran together")


def assert_openai_error(body: dict[str, Any]) -> None:
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == "server_error"
