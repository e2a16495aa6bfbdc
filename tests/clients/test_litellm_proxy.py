"""LiteLLM's proxy in front of the demo, asked by `openai`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from demo_server import await_ok, free_port
from pydantic import BaseModel

CLIENT, PACKAGE = "LiteLLM proxy", "litellm"
HELLO: Any = {"role": "user", "content": "Hello"}
KEY = "sk-proxy"


class Choice(BaseModel):
    city: Literal["Paris", "Oslo"]


TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": Choice.model_json_schema()}}


@pytest.fixture(scope="module")
def proxy(demo, tmp_path_factory):
    """The proxy as its users start it, with nothing fetched from elsewhere."""
    place, port = tmp_path_factory.mktemp("proxy"), free_port()
    model = {"model": f"hosted_vllm/{demo.model}", "api_base": demo.v1, "api_key": demo.key}
    config = {
        "model_list": [{"model_name": "demo", "litellm_params": model}],
        "litellm_settings": {"telemetry": False, "num_retries": 0},
        "general_settings": {"master_key": KEY},
    }
    (place / "config.yaml").write_text(json.dumps(config))
    command = [Path(sys.executable).with_name("litellm"), "--config", place / "config.yaml"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=place, env=environment)
    try:
        await_ok(f"http://127.0.0.1:{port}/health/liveliness", process, place / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def ask(proxy):
    with openai.OpenAI(base_url=proxy, api_key=KEY, max_retries=0) as client:

        def ask(messages: Any, **more: Any) -> Any:
            options = {"max_tokens": 400, "temperature": 0, **more}
            return client.chat.completions.create(model="demo", messages=messages, **options)

        yield ask


def test_conversation(ask) -> None:
    first = ask([HELLO]).choices[0].message
    assert ask([HELLO, first, HELLO]).choices[0].message.content


def test_tools(ask) -> None:
    message = ask([HELLO], tools=[TOOL], tool_choice="required").choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments)["city"] in ("Paris", "Oslo")
    results = [{"role": "tool", "tool_call_id": call.id, "content": "Sun."} for call in message.tool_calls]
    assert ask([HELLO, message, *results], tools=[TOOL]).choices


def test_stream(ask) -> None:
    chunks = list(ask([HELLO], stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage.completion_tokens


def test_structured(ask) -> None:
    schema = {"name": "choice", "schema": Choice.model_json_schema(), "strict": True}
    answer = ask([HELLO], response_format={"type": "json_schema", "json_schema": schema})
    assert Choice.model_validate_json(answer.choices[0].message.content)


def test_refusal(ask) -> None:
    with pytest.raises(openai.BadRequestError, match="ContextWindowExceeded"):
        ask([{"role": "user", "content": "x " * 3000}])
