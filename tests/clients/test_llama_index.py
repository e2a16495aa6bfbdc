"""LlamaIndex's `OpenAILike`."""

from typing import Literal

import openai
import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

CLIENT, PACKAGE = "LlamaIndex", "llama-index-llms-openai-like"
HELLO = ChatMessage(role="user", content="Hello")


class Choice(BaseModel):
    """A city."""

    city: Literal["Paris", "Oslo"]


def weather(city: Literal["Paris", "Oslo"]) -> str:
    """The weather in a city."""
    return f"Sun in {city}."


@pytest.fixture
def model(demo):
    return OpenAILike(
        model=demo.model,
        api_base=demo.v1,
        api_key=demo.key,
        is_chat_model=True,
        is_function_calling_model=True,
        should_use_structured_outputs=True,
        max_tokens=200,
        temperature=0,
        max_retries=0,
    )


def test_conversation(model) -> None:
    assert model.chat([HELLO, model.chat([HELLO]).message, HELLO]).message.content


def test_tools(model) -> None:
    tool = FunctionTool.from_defaults(weather)
    answer = model.chat_with_tools([tool], chat_history=[HELLO], tool_required=True)
    calls = model.get_tool_calls_from_response(answer)
    results = [
        ChatMessage(role="tool", content="Sun.", additional_kwargs={"tool_call_id": call.tool_id}) for call in calls
    ]
    assert results
    assert model.chat_with_tools([tool], chat_history=[HELLO, answer.message, *results]).message.content


def test_stream(model) -> None:
    assert "".join(part.delta or "" for part in model.stream_chat([HELLO]))


def test_structured(model) -> None:
    assert model.as_structured_llm(Choice).chat([HELLO]).raw.city in ("Paris", "Oslo")


def test_refusal(model) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        model.chat([ChatMessage(role="user", content="x " * 3000)])
    assert long.value.code == "context_length_exceeded"
