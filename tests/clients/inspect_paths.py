"""inspect-ai's paths, in its own environment: `python inspect_paths.py PATH`, told the server by OPENAI_* variables."""

import asyncio
import os
import sys
from collections.abc import Iterator
from typing import Any, Literal

from inspect_ai import Task, eval_async
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalSample
from inspect_ai.model import ChatMessageTool, GenerateConfig, Model, ResponseSchema, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver, use_tools, user_message
from inspect_ai.tool import Tool, tool
from inspect_ai.util import json_schema
from pydantic import BaseModel

SETTINGS = GenerateConfig(max_tokens=400, temperature=0, max_retries=0)


class Choice(BaseModel):
    city: Literal["Paris", "Oslo"]


@tool
def weather() -> Tool:
    async def execute(city: Literal["Paris", "Oslo"]) -> str:
        """The weather in a city.

        Args:
            city: The city.
        """
        return f"Sun in {city}."

    return execute


@solver
def forced() -> Solver:
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        state.tool_choice = "any"
        return await generate(state, tool_calls="single")

    return solve


def models() -> Iterator[Model]:
    """The demo, answering in one piece and streaming."""
    name = f"openai-api/flexgate/{os.environ['FLEXGATE_MODEL']}"
    where = {"base_url": os.environ["OPENAI_BASE_URL"], "api_key": os.environ["OPENAI_API_KEY"]}
    for stream in (False, True):
        yield get_model(name, config=SETTINGS, memoize=False, stream=stream, **where)


async def evaluated(model: Model, *steps: Solver, text: str = "Hello") -> EvalSample:
    """The one sample of an evaluation of these steps."""
    task = Task([Sample(input=text, target="x")], solver=list(steps), scorer=includes())
    (log,) = await eval_async(task, model=model, log_dir="logs", fail_on_error=True)  # samples are read from there
    assert log.status == "success", log.error
    (sample,) = log.samples or []
    return sample


async def conversation(model: Model) -> None:
    sample = await evaluated(model, generate(), user_message("Hello"), generate())
    assert [message.role for message in sample.messages] == ["user", "assistant", "user", "assistant"]
    assert sample.messages[-1].text


async def tools(model: Model) -> None:
    sample = await evaluated(model, use_tools(weather()), forced())
    results = [message for message in sample.messages if isinstance(message, ChatMessageTool)]
    assert results
    assert all(result.error is None and result.text.startswith("Sun in ") for result in results)


async def stream(model: Model) -> None:
    answer = await model.generate("Hello")
    assert answer.completion
    assert answer.usage
    assert answer.usage.output_tokens


async def structured(model: Model) -> None:
    schema = ResponseSchema(name="choice", json_schema=json_schema(Choice))
    answer = await model.generate("Hello", config=GenerateConfig(response_schema=schema))
    assert Choice.model_validate_json(answer.completion)


async def refusal(model: Model) -> None:
    """A prompt that is too long ends its sample, not the evaluation."""
    sample = await evaluated(model, generate(), text="x " * 3000)
    assert sample.output.stop_reason == "model_length", sample.output


async def main(path: str) -> None:
    run: Any = globals()[path]
    for model in models():
        await run(model)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
