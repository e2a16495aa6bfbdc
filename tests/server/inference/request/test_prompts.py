"""Prompts of completions: every form has its choices, and others are refused by place."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from inferencekit import PATH


def finish(index: int) -> str:
    choice = {"index": index, "text": "x", "finish_reason": "stop"}
    return f"data: {json.dumps({'id': 'c', 'choices': [choice]}, separators=(',', ':'))}\n\n"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("prompt", "choices"), [("x", 1), ([1, 2], 1), (["x", "y"], 2), ([[1, 2], [3]], 2), ([[1, 2]], 1)]
)
async def test_every_form_of_a_prompt_has_as_many_choices_as_vllm_answers(
    client: httpx.AsyncClient, handler: Any, prompt: Any, choices: int
) -> None:
    async def events() -> AsyncIterator[str]:
        for index in range(choices):
            yield finish(index)
        yield "data: [DONE]\n\n"

    handler.result = events
    response = await client.post(PATH, json={"prompt": prompt, "stream": True})
    *_, last, _, _ = response.text.split("\n\n")
    assert "flexgate" in json.loads(last.removeprefix("data: "))
    (request,) = handler.seen
    assert len(request.prompt) == choices


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([1.0, 2.0], "prompt[0]"),
        ([1.0] * 17, "prompt[0]"),
        ([1, 2.0], "prompt[0]"),
        (["x", 1], "prompt[1]"),
        ([[1], [2.0]], "prompt[1]"),
        ([True], "prompt[0]"),
        ([[]], "prompt[0]"),
        ({"a": 1}, "prompt"),
        (7, "prompt"),
    ],
)
async def test_a_prompt_of_no_known_form_is_refused_by_place(
    client: httpx.AsyncClient, handler: Any, prompt: Any, param: str
) -> None:
    response = await client.post(PATH, json={"prompt": prompt})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert not handler.seen


@pytest.mark.asyncio
async def test_options_of_a_stream_are_true_or_false(client: httpx.AsyncClient, handler: Any) -> None:
    body = {"prompt": "x", "stream": True, "stream_options": {"include_usage": "false"}}
    response = await client.post(PATH, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "stream_options.include_usage")
