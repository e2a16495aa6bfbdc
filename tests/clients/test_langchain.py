"""LangChain's `ChatOpenAI`."""

from typing import Literal

import openai
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

CLIENT, PACKAGE = "LangChain", "langchain-openai"


class Choice(BaseModel):
    """A city."""

    city: Literal["Paris", "Oslo"]


@tool
def weather(city: Literal["Paris", "Oslo"]) -> str:
    """The weather in a city."""
    return f"Sun in {city}."


@pytest.fixture
def model(demo):
    return ChatOpenAI(
        model=demo.model, base_url=demo.v1, api_key=demo.key, max_tokens=400, temperature=0, max_retries=0
    )


def test_conversation(model) -> None:
    hello = HumanMessage("Hello")
    assert model.invoke([hello, model.invoke([hello]), hello]).content


def test_tools(model) -> None:
    hello = HumanMessage("Hello")
    called = model.bind_tools([weather], tool_choice="required").invoke([hello])
    results = [ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"]) for call in called.tool_calls]
    assert results
    assert model.bind_tools([weather]).invoke([hello, called, *results]).content


def test_stream(model) -> None:
    assert "".join(chunk.text for chunk in model.stream("Hello"))


def test_structured(model) -> None:
    assert model.with_structured_output(Choice).invoke("Hello").city in ("Paris", "Oslo")


def test_refusal(model) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        model.invoke("x " * 3000)
    assert long.value.code == "context_length_exceeded"
    assert type(long.value).__name__ == "OpenAIContextOverflowError"
