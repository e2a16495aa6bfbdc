"""Starting and stopping the process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import live_server
import psutil
import pytest
from transcripts import transcript

pytestmark = pytest.mark.engine


def end(running: live_server.LiveServer, _family: list[psutil.Process]) -> None:
    running.process.send_signal(signal.SIGTERM)


def interrupt(running: live_server.LiveServer, family: list[psutil.Process]) -> None:
    """What a terminal does at Ctrl-C."""
    for process in (running.process, *family):
        process.send_signal(signal.SIGINT)


STAGES = ["reading the checkpoint", "checking weights", "loading vLLM", "starting the engine", "proving the gate"]
SUMMARY = [
    "model    … (2 layers, float32)",
    "experts  public (commons), news (gazette), math (academy), code (forge), secret (vault)",
    "slots    7",
    "kernels  …",
    "address  http://127.0.0.1:PORT",
]


@pytest.mark.parametrize(
    ("stop", "ranks", "terminal"),
    [
        pytest.param(end, 1, False, id="end-1", marks=pytest.mark.slow),
        pytest.param(interrupt, 1, True, id="interrupt-1"),
        pytest.param(interrupt, 2, False, id="interrupt-2", marks=pytest.mark.slow),
    ],
)
def test_a_signal_drains_and_leaves_no_process(
    stop: Callable[[live_server.LiveServer, list[psutil.Process]], None],
    ranks: int,
    terminal: bool,
    text_checkpoint: Path,
    tmp_path: Path,
) -> None:
    running = live_server.start(text_checkpoint, tmp_path, f"--tensor-parallel-size={ranks}", terminal=terminal)
    family = live_server.family(running)
    assert family, "the engine has a process of its own"
    answers: list[Any] = []

    def long_request() -> None:
        with running.client() as http:
            constrained = {"prompt": "the", "max_tokens": 9, "structured_outputs": {"choice": ["yes", "no"]}}
            answers.append(http.post("/v1/completions", json=constrained))
            body = {"prompt": "the", "max_tokens": 600, "ignore_eos": True}
            answers.append(http.post("/v1/completions", json=body))

    thread = threading.Thread(target=long_request)
    thread.start()
    while not answers:
        assert thread.is_alive()
        time.sleep(0.01)
    time.sleep(0.5)
    stop(running, family)
    time.sleep(0.2)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{running.url}/health")
    thread.join(60)
    assert running.process.wait(60) == 0
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[1].json()["usage"]["completion_tokens"] == 600
    shown = [re.sub(r"^(slots +\d+), on each rank .*", r"\1", line) for line in transcript(running.log)]
    stages = [] if terminal else [f"{stage} ..." for stage in STAGES]
    stopping = "TIME info    stopping (flexgate.server.lifecycle.serve)" if terminal else "info: stopping"
    # A rank with a process of its own loads vLLM before anything can configure its logging.
    ranks_own = ["Triton is installed, but doesn't include CPU backend. Disabling Triton."] * ranks if ranks > 1 else []
    assert shown == [*stages[:-1], *ranks_own, *stages[-1:], *SUMMARY, stopping]
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive


def test_the_engine_core_runs_one_rank_itself(server: live_server.LiveServer) -> None:
    names = [process.name() for process in live_server.family(server)]
    assert sum("EngineCor" in name for name in names) == 1
    assert not any("Worker" in name for name in names), "a step would cross one more process"


@pytest.mark.slow
def test_the_summary_says_what_computes_and_where_it_listens(text_checkpoint: Path, tmp_path: Path) -> None:
    running = live_server.start(
        text_checkpoint, tmp_path, "--moe-kernels=flexgate", f"--admin-port={live_server.free_port()}"
    )
    try:
        said = running.log.read_text()
        assert re.search(r"^kernels +flexgate \(torch reference\), routing in C\s*$", said, re.MULTILINE)
        administration = re.search(r"^administration +(http://\S+)\s*$", said, re.MULTILINE)
        assert administration is not None
        with running.client() as http:
            assert http.post("/v1/completions", json={"prompt": "the", "max_tokens": 4}).status_code == 200
        with running.client("admin") as http:
            projects = [http.get(f"{base}/v1/organization/projects") for base in ("", administration[1])]
        assert [response.status_code for response in projects] == [404, 200]
    finally:
        assert live_server.stop(running) == 0


def test_a_dead_engine_ends_the_server_with_a_failure(text_checkpoint: Path, tmp_path: Path) -> None:
    running = live_server.start(text_checkpoint, tmp_path)
    family = live_server.family(running)
    for process in family:
        if "EngineCore" in process.name() or "EngineCore" in " ".join(process.cmdline()):
            process.kill()
    assert running.process.wait(60) == 1
    assert "the engine has died" in running.log.read_text()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive


def refused(directory: Path, *arguments: str, **environment: str) -> tuple[int, str, int]:
    """Exit status, standard error, and the port that was asked for."""
    port = live_server.free_port()
    command = [str(Path(sys.executable).with_name("flexgate")), "serve", *arguments]
    done = subprocess.run(
        [*command, f"--port={port}", "--enforce-eager", "--kv-cache-memory-bytes=67108864"],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=directory,
        env={**os.environ, "XDG_STATE_HOME": str(directory), **environment},
    )
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", port)) != 0
    return done.returncode, done.stderr, port


def broken(source: Path, target: Path, how: str) -> Path:
    shutil.copytree(source, target)
    weights = target / "model.safetensors"
    config = json.loads((target / "config.json").read_text())
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "no weights":
        weights.unlink()
    elif how == "another architecture":
        config["model_type"] = "llama"
    elif how == "other shapes":
        config["intermediate_size"] = 96
    elif how == "no tokenizer":
        (target / "tokenizer_config.json").unlink()
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_what_is_checked_before_the_engine_starts_does_not_wait_for_vllm_to_load() -> None:
    program = "import flexgate.server.lifecycle.bootstrap, sys; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


@pytest.mark.parametrize(
    "how",
    ["truncated", "no weights", "another architecture", "other shapes", "no tokenizer", "missing"],
)
def test_a_bad_checkpoint_is_one_sentence_and_nothing_listens(text_checkpoint: Path, tmp_path: Path, how: str) -> None:
    target = tmp_path / "bad"
    if how != "missing":
        broken(text_checkpoint, target, how)
    status, said, _ = refused(tmp_path, str(target))
    assert status != 0
    sentence = said.strip().splitlines()[-1]
    assert sentence.startswith("flexgate: ")
    assert str(target) in sentence
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_restart_refuses_yesterdays_database(text_checkpoint: Path, tmp_path: Path) -> None:
    """What the server confirmed while it ran is remembered beside the database."""
    database, yesterday = tmp_path / "flexgate.db", tmp_path / "yesterday.db"
    live_server.seed_store(f"sqlite:///{database}", live_server.experts_of(text_checkpoint))
    shutil.copy(database, yesterday)
    running = live_server.start(text_checkpoint, tmp_path)
    try:
        with running.client("admin") as http:
            assert http.post("/v1/organization/projects/proj_press/archive").status_code == 200
    finally:
        assert live_server.stop(running) == 0
    options = (f"--database-url=sqlite:///{database}", f"--state-dir={tmp_path}")
    shutil.copy(yesterday, database)
    status, said, _ = refused(tmp_path, str(text_checkpoint), *options)
    assert status == 1
    assert "was served: restore the newer database, or remove " in said
    assert "Traceback" not in said


def test_a_taken_port_is_one_sentence(text_checkpoint: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [str(Path(sys.executable).with_name("flexgate")), "serve", str(text_checkpoint)]
        done = subprocess.run(
            [*command, f"--port={taken.getsockname()[1]}"],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "XDG_STATE_HOME": str(tmp_path)},
        )
    assert done.returncode == 1
    assert "cannot listen on 127.0.0.1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--host=0.0.0.0", "--demo"), "loopback only"),
        (("/models/x", "--host=0.0.0.0"), "--allow-remote"),
        ((), "name a model's folder"),
    ],
)
def test_a_bad_option_is_one_sentence(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    status, said, _ = refused(tmp_path, *arguments)
    assert status == 2
    assert message in said
    assert "Traceback" not in said


def test_development_mode_is_refused(text_checkpoint: Path, tmp_path: Path) -> None:
    status, said, _ = refused(tmp_path, str(text_checkpoint), VLLM_SERVER_DEV_MODE="1")
    assert status == 1
    assert "VLLM_SERVER_DEV_MODE" in said
