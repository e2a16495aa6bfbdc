"""Instructor, by tools and by schema."""

from typing import Literal

import instructor
import openai
import pytest
from pydantic import BaseModel, field_validator

CLIENT, PACKAGE = "Instructor", "instructor"
HELLO = {"role": "user", "content": "Hello"}


class Choice(BaseModel):
    """A city."""

    city: Literal["Paris", "Oslo"]


@pytest.fixture
def client(demo):
    with openai.OpenAI(base_url=demo.v1, api_key=demo.key, max_retries=0) as made:
        yield made


def ask(client, demo, mode, messages, **more):
    made = instructor.from_openai(client, mode=mode)
    options = {"max_tokens": 200, "temperature": 0, "max_retries": 0, **more}
    return made.chat.completions.create(model=demo.model, messages=messages, response_model=Choice, **options)


def test_conversation(client, demo) -> None:
    """An answer that its model refuses goes back with the reason, as a tool's result, and is asked again."""
    judged: list[str] = []

    class Judged(Choice):
        @field_validator("city")
        @classmethod
        def not_at_first(cls, city: str) -> str:
            judged.append(city)
            if len(judged) == 1:
                raise ValueError("say it again")
            return city

    made = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
    options = {"max_tokens": 200, "temperature": 0, "max_retries": 2}
    made.chat.completions.create(model=demo.model, messages=[HELLO], response_model=Judged, **options)
    assert len(judged) == 2


def test_tools(client, demo) -> None:
    assert ask(client, demo, instructor.Mode.TOOLS, [HELLO]).city in ("Paris", "Oslo")


def test_stream(client, demo) -> None:
    made = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
    parts = made.chat.completions.create_partial(
        model=demo.model, messages=[HELLO], response_model=Choice, max_tokens=200, temperature=0
    )
    assert list(parts)[-1].city in ("Paris", "Oslo")


def test_structured(client, demo) -> None:
    assert ask(client, demo, instructor.Mode.JSON_SCHEMA, [HELLO]).city in ("Paris", "Oslo")


def test_refusal(client, demo) -> None:
    with pytest.raises(Exception, match="context_length_exceeded"):
        ask(client, demo, instructor.Mode.TOOLS, [{"role": "user", "content": "x " * 3000}])
