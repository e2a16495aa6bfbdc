"""guidellm, the load generator."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TOKENIZER, finished

CLIENT, PACKAGE = "guidellm", "guidellm"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_rate",
        "parameters": {"type": "object", "properties": {"of": {"enum": ["gold", "wheat"]}}, "required": ["of"]},
    },
}
"""guidellm's own tool takes any text, of which the demo's small model does not come to an end."""


@pytest.fixture
def benchmark(demo, tmp_path):
    def run(*, stream: bool = True, prompt: int = 16, **more: Any) -> dict[str, list[Any]]:
        """Four requests, over chat or (not streamed) over completions; returns them by how they ended."""
        target = {"kind": "openai_http", "target": demo.url, "model": demo.model, "api_key": demo.key, "stream": stream}
        target |= {"request_format": "/v1/chat/completions" if stream else "/v1/completions"}
        words = {
            "--backend": target,
            "--data": {"kind": "synthetic_text", "prompt_tokens": prompt, "output_tokens": 8, **more},
            "--profile": {"kind": "synchronous"} if stream else {"kind": "concurrent", "streams": 2},
            "--constraint": {"kind": "max_requests", "count": 4},
            "--tokenizer": {"kind": "huggingface_auto", "model": str(TOKENIZER)},
            "--output": {"kind": "json", "path": str(tmp_path / "report.json")},
        }
        options = [word for name, value in words.items() for word in (name, json.dumps(value))]
        finished([Path(sys.executable).with_name("guidellm"), "run", "--disable-console", *options], tmp_path)
        (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
        return benchmark["requests"]

    return run


def test_load(benchmark) -> None:
    requests = benchmark(stream=False)
    assert len(requests["successful"]) >= 4
    assert not requests["errored"]


def test_stream(benchmark) -> None:
    requests = benchmark()
    assert len(requests["successful"]) >= 4
    assert not requests["errored"]


def test_conversation(benchmark) -> None:
    requests = benchmark(turns=2)
    assert len(requests["successful"]) >= 4
    assert not requests["errored"]


def test_tools(benchmark) -> None:
    """Conversations of a turn that must call a tool, and of one with the tool's result."""
    requests = benchmark(turns=1, tool_call_turns=1, tools=[TOOL])
    assert len(requests["successful"]) >= 4
    assert not requests["errored"]
    made = [request["tool_calls"] for request in requests["successful"]]
    assert 2 <= sum(map(bool, made)) < len(made)
    calls = [call["function"] for calls in made for call in calls or ()]
    assert {call["name"] for call in calls} == {"get_rate"}
    assert all(json.loads(call["arguments"])["of"] in ("gold", "wheat") for call in calls)


def test_refusal(benchmark) -> None:
    """A prompt that is too long is counted as an error with the server's status, and the run goes on."""
    requests = benchmark(prompt=3000)
    assert not requests["successful"]
    assert requests["errored"]
    assert all("400" in request["info"]["error"] for request in requests["errored"])
