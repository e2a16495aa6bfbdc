"""Pydantic AI over chat."""

from typing import Literal

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

CLIENT, PACKAGE = "Pydantic AI", "pydantic-ai-slim"


class Choice(BaseModel):
    """A city."""

    city: Literal["Paris", "Oslo"]


@pytest.fixture
def agent(demo):
    model = OpenAIChatModel(demo.model, provider=OpenAIProvider(base_url=demo.v1, api_key=demo.key))

    def make(**more):
        return Agent(model, model_settings={"temperature": 0, "max_tokens": 400}, retries=0, **more)

    return make


def test_conversation(agent) -> None:
    first = agent().run_sync("Hello")
    assert agent().run_sync("Hello", message_history=first.all_messages()).output


def test_tools(agent) -> None:
    """An output of its own type is a tool that has to be called; beside it another may be."""
    made = agent(output_type=Choice)

    @made.tool_plain
    def weather(city: Literal["Paris", "Oslo"]) -> str:
        """The weather in a city."""
        return f"Sun in {city}."

    first = made.run_sync("Hello")
    assert first.output.city in ("Paris", "Oslo")
    assert made.run_sync("Hello", message_history=first.all_messages()).output


@pytest.mark.asyncio
async def test_stream(agent) -> None:
    async with agent().run_stream("Hello") as run:
        assert [text async for text in run.stream_text(delta=True)]


def test_structured(agent) -> None:
    assert agent(output_type=NativeOutput(Choice)).run_sync("Hello").output.city in ("Paris", "Oslo")


def test_refusal(agent) -> None:
    with pytest.raises(ModelHTTPError) as long:
        agent().run_sync("x " * 3000)
    assert long.value.body["code"] == "context_length_exceeded"
