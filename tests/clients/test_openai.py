"""The `openai` package: chat and Responses."""

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

CLIENT, PACKAGE = "openai (Python)", "openai"
HELLO: Any = {"role": "user", "content": "Hello"}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}


class Choice(BaseModel):
    city: Literal["Paris", "Oslo"]


@pytest.fixture
def client(demo):
    with openai.OpenAI(base_url=demo.v1, api_key=demo.key, max_retries=0) as made:
        yield made


def test_conversation(client, demo) -> None:
    first = client.chat.completions.create(model=demo.model, messages=[HELLO], max_tokens=8)
    second = client.chat.completions.create(
        model=demo.model, messages=[HELLO, first.choices[0].message, HELLO], max_tokens=8
    )
    assert second.choices[0].message.content
    said = client.responses.create(model=demo.model, input=[HELLO], max_output_tokens=8)
    again = client.responses.create(model=demo.model, input=[HELLO, *said.output, HELLO], max_output_tokens=8)
    assert again.output_text


def test_tools(client, demo) -> None:
    function = {"name": "weather", "description": "The weather in a city.", "parameters": PARAMETERS}
    ask: Any = {"model": demo.model, "tools": [{"type": "function", "function": function}], "max_tokens": 400}
    answer = client.chat.completions.create(messages=[HELLO], tool_choice="required", temperature=0, **ask)
    message = answer.choices[0].message
    (call,) = message.tool_calls[:1]
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Oslo")
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "Sun."}]}
    results = [{**result, "tool_call_id": call.id} for call in message.tool_calls]
    assert client.chat.completions.create(messages=[HELLO, message, *results], tool_choice="auto", **ask).choices
    tools: Any = [{"type": "function", "strict": True, **function}]
    said = client.responses.create(
        model=demo.model, input=[HELLO], tools=tools, tool_choice="required", max_output_tokens=400, temperature=0
    )
    calls = [item for item in said.output if item.type == "function_call"]
    outputs: Any = [
        {
            "type": "function_call_output",
            "call_id": call.call_id,
            "output": [{"type": "input_text", "text": "Sun."}],
        }
        for call in calls
    ]
    assert calls
    items = [HELLO, *said.output, *outputs]
    assert client.responses.create(model=demo.model, input=items, tools=tools, max_output_tokens=8).output


def test_stream(client, demo) -> None:
    ask: Any = {"model": demo.model, "messages": [HELLO], "max_tokens": 4}
    with client.chat.completions.stream(**ask, stream_options={"include_usage": True}) as stream:
        events = list(stream)
    assert any(event.type == "content.delta" for event in events)
    assert stream.current_completion_snapshot.usage.completion_tokens == 4
    with client.responses.stream(model=demo.model, input="Hello", max_output_tokens=4) as stream:
        kinds = [event.type for event in stream]
    assert kinds[-1] == "response.incomplete"


def test_structured(client, demo) -> None:
    ask: Any = {"model": demo.model, "temperature": 0}
    parsed = client.chat.completions.parse(messages=[HELLO], response_format=Choice, max_tokens=200, **ask)
    assert parsed.choices[0].message.parsed.city in ("Paris", "Oslo")
    said = client.responses.parse(input="Hello", text_format=Choice, max_output_tokens=200, **ask)
    assert said.output_parsed.city in ("Paris", "Oslo")


def test_refusal(client, demo) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=demo.model, messages=[{"role": "user", "content": "x " * 3000}])
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
    filtered = {"flexgate": {"experts": {"only": ["math"]}}}
    with pytest.raises(openai.PermissionDeniedError) as denied:
        client.with_options(api_key="sk-demo-public").chat.completions.create(
            model=demo.model, messages=[HELLO], extra_body=filtered
        )
    assert denied.value.code == "expert_policy_denied"
