"""LiteLLM's SDK."""

import json
from typing import Any, Literal

import litellm
import pytest
from pydantic import BaseModel

CLIENT, PACKAGE = "LiteLLM SDK", "litellm"
HELLO: Any = {"role": "user", "content": "Hello"}
litellm.telemetry = False


class Choice(BaseModel):
    city: Literal["Paris", "Oslo"]


TOOL = {"type": "function", "function": {"name": "weather", "parameters": Choice.model_json_schema()}}


@pytest.fixture
def ask(demo):
    def ask(messages: Any, **more: Any) -> Any:
        options = {"max_tokens": 400, "temperature": 0, "num_retries": 0, **more}
        model = f"hosted_vllm/{demo.model}"
        return litellm.completion(model=model, api_base=demo.v1, api_key=demo.key, messages=messages, **options)

    return ask


def test_conversation(ask) -> None:
    first = ask([HELLO]).choices[0].message
    assert ask([HELLO, first, HELLO]).choices[0].message.content
    assert ask([HELLO, first.model_dump(), HELLO]).choices[0].message.content


def test_tools(ask) -> None:
    message = ask([HELLO], tools=[TOOL], tool_choice="required").choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments)["city"] in ("Paris", "Oslo")
    results = [{"role": "tool", "tool_call_id": call.id, "content": "Sun."} for call in message.tool_calls]
    assert ask([HELLO, message, *results], tools=[TOOL]).choices[0].message.content


def test_stream(ask) -> None:
    chunks = list(ask([HELLO], stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert litellm.stream_chunk_builder(chunks).choices[0].message.content


def test_structured(ask) -> None:
    answer = ask([HELLO], response_format=Choice)
    assert Choice.model_validate_json(answer.choices[0].message.content)


def test_refusal(ask) -> None:
    with pytest.raises(litellm.BadRequestError) as long:
        ask([{"role": "user", "content": "x " * 3000}])
    assert isinstance(long.value, litellm.ContextWindowExceededError)
