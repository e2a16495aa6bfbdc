"""`openai-agents` over chat and over Responses."""

from typing import Any, Literal

import openai
import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from pydantic import BaseModel

CLIENT, PACKAGE = "openai-agents", "openai-agents"
MODELS = [OpenAIChatCompletionsModel, OpenAIResponsesModel]
set_tracing_disabled(True)
called: list[str] = []


class Choice(BaseModel):
    city: Literal["Paris", "Oslo"]


@function_tool
def weather(city: Literal["Paris", "Oslo"]) -> str:
    """The weather in a city."""
    called.append(city)
    return "Sun."


@pytest.fixture(params=MODELS, ids=["chat", "responses"])
def agent(request, demo):
    client = openai.AsyncOpenAI(base_url=demo.v1, api_key=demo.key, max_retries=0)
    model = request.param(model=demo.model, openai_client=client)

    def make(**more: Any) -> Agent:
        settings = ModelSettings(temperature=0, max_tokens=400, **more.pop("settings", {}))
        return Agent(name="A", instructions="Be short.", model=model, model_settings=settings, **more)

    return make


@pytest.mark.asyncio
async def test_conversation(agent) -> None:
    first = await Runner.run(agent(), "Hello")
    second = await Runner.run(agent(), [*first.to_input_list(), {"role": "user", "content": "Hello"}])
    assert second.final_output


@pytest.mark.asyncio
async def test_tools(agent) -> None:
    called.clear()
    result = await Runner.run(agent(tools=[weather], settings={"tool_choice": "required"}), "Hello", max_turns=3)
    assert called
    assert result.final_output


@pytest.mark.asyncio
async def test_stream(agent) -> None:
    run = Runner.run_streamed(agent(tools=[weather]), "Hello")
    kinds = [event.type async for event in run.stream_events()]
    assert "raw_response_event" in kinds
    assert run.final_output


@pytest.mark.asyncio
async def test_structured(agent) -> None:
    result = await Runner.run(agent(output_type=Choice), "Hello")
    assert result.final_output.city in ("Paris", "Oslo")


@pytest.mark.asyncio
async def test_refusal(agent) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        await Runner.run(agent(), "x " * 3000)
    assert long.value.code == "context_length_exceeded"
