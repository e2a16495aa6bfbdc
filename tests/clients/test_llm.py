"""The `llm` command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CLIENT, PACKAGE = "llm", "llm"
TOOL = """
def weather(city: str) -> str:
    "The weather in a city."
    return "Sun."
"""


@pytest.fixture
def llm(demo, tmp_path, monkeypatch):
    """The command, which keeps what it knows in a folder of its own."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    model = {"model_id": "demo", "model_name": demo.model, "api_base": demo.v1, "api_key_name": "demo"}
    abilities = {"supports_tools": True, "supports_schema": True}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([{**model, **abilities}]))
    (tmp_path / "keys.json").write_text(json.dumps({"demo": demo.key}))

    def run(*words: str, fails: bool = False) -> str:
        command = [Path(sys.executable).with_name("llm"), "-m", "demo", "-o", "temperature", "0", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
        assert (done.returncode != 0) == fails, done.stderr
        return done.stderr if fails else done.stdout.strip()

    return run


def test_conversation(llm) -> None:
    assert llm("Hello", "--no-stream", "-o", "max_tokens", "30")
    assert llm("Hello", "-c", "--no-stream", "-o", "max_tokens", "30")


def test_stream(llm) -> None:
    assert llm("Hello", "-o", "max_tokens", "30")


@pytest.mark.parametrize("more", [(), ("--no-stream",)], ids=["streamed", "whole"])
def test_tools(llm, more) -> None:
    llm("Hello", "--functions", TOOL, "-o", "max_tokens", "400", *more)


def test_structured(llm) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Oslo"]}}, "required": ["city"]}
    answer = llm("Hello", "--schema", json.dumps(schema), "-o", "max_tokens", "100")
    assert json.loads(answer)["city"] in ("Paris", "Oslo")


def test_refusal(llm) -> None:
    assert "maximum context length" in llm("x " * 3000, fails=True)
