"""Every refusal, word for word: `golden/refusals.json` is reviewed like code.

`FLEXGATE_WRITE_GOLDEN=1` writes what the server says now; the difference is then the review.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "refusals.json"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
PART = {"type": "text", "text": "hello"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x"}}
DEEP: dict[str, Any] = {}
for _ in range(40):
    DEEP = {"items": DEEP}


def chat(**more: Any) -> dict[str, Any]:
    return {"messages": HELLO, **more}


def completion(**more: Any) -> dict[str, Any]:
    return {"prompt": "hello", **more}


def gate(**more: Any) -> dict[str, Any]:
    return completion(flexgate=more)


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": value}}


# name → (key, path, body); a body of bytes is sent as it is.
CASES: dict[str, tuple[str | None, str, Any]] = {
    "no key": (None, CHAT, chat()),
    "wrong key": ("sk-nobody", CHAT, chat()),
    "revoked key": ("sk-revoked", CHAT, chat()),
    "expired key": ("sk-expired", CHAT, chat()),
    "admin key cannot infer": ("sk-admin", CHAT, chat()),
    "owner key cannot infer": ("sk-owner", COMPLETIONS, completion()),
    "auditor key cannot tokenize": ("sk-auditor", "/tokenize", {"prompt": "x"}),
    "malformed JSON": ("sk-t", CHAT, b"{"),
    "no object": ("sk-t", CHAT, b"[]"),
    "too large": ("sk-t", CHAT, b'{"messages": "' + b"x" * (1 << 20) + b'"}'),
    "unknown model": ("sk-t", CHAT, chat(model="gpt-9")),
    "path as model": ("sk-t", COMPLETIONS, completion(model="../../etc")),
    "unknown field": ("sk-t", CHAT, chat(guided_json="{}")),
    "xargs": ("sk-t", CHAT, chat(vllm_xargs={"flexgate": "x"})),
    "kv transfer": (
        "sk-t",
        COMPLETIONS,
        completion(kv_transfer_params={"do_remote_prefill": True}),
    ),
    "ec transfer": ("sk-t", COMPLETIONS, completion(ec_transfer_params={})),
    "priority": ("sk-t", CHAT, chat(priority=-1)),
    "beam search": ("sk-t", CHAT, chat(use_beam_search=True)),
    "prompt embeddings": ("sk-t", COMPLETIONS, completion(prompt_embeds="AAAA")),
    "request id": ("sk-t", CHAT, chat(request_id="mine")),
    "session id": ("sk-t", CHAT, chat(session_id="mine")),
    "chat template": ("sk-t", CHAT, chat(chat_template="{{ x }}")),
    "chat template arguments": ("sk-t", CHAT, chat(chat_template_kwargs={"chat_template": "x"})),
    "service tier": ("sk-t", CHAT, chat(service_tier="priority")),
    "suffix": ("sk-t", COMPLETIONS, completion(suffix="after")),
    "best of": ("sk-t", COMPLETIONS, completion(best_of=4)),
    "background": ("sk-t", RESPONSES, {"input": "x", "background": True}),
    "previous response": ("sk-t", RESPONSES, {"input": "x", "previous_response_id": "resp_1"}),
    "stored prompt": ("sk-t", RESPONSES, {"input": "x", "prompt": {"id": "p"}}),
    "n over limit": ("sk-t", CHAT, chat(n=9)),
    "n of zero": ("sk-t", CHAT, chat(n=0)),
    "n as text": ("sk-t", CHAT, chat(n="2")),
    "n as true": ("sk-t", CHAT, chat(n=True)),
    "n enormous": ("sk-t", CHAT, chat(n=10**30)),
    "prompts over limit": ("sk-t", COMPLETIONS, completion(prompt=["x"] * 17)),
    "lists of ids over limit": ("sk-t", COMPLETIONS, completion(prompt=[[7]] * 17)),
    "floats as many prompts": ("sk-t", COMPLETIONS, completion(prompt=[1.0] * 17)),
    "messages over limit": ("sk-t", CHAT, chat(messages=HELLO * 4097)),
    "parts over limit": ("sk-t", CHAT, chat(messages=[{"role": "user", "content": [PART] * 4096}])),
    "calls over limit": ("sk-t", CHAT, chat(messages=[*HELLO, {"role": "assistant", "tool_calls": [CALL] * 129}])),
    "items over limit": ("sk-t", RESPONSES, {"input": HELLO * 4097}),
    "no prompt": ("sk-t", COMPLETIONS, {}),
    "empty prompt": ("sk-t", COMPLETIONS, completion(prompt="")),
    "prompt object": ("sk-t", COMPLETIONS, completion(prompt={"a": 1})),
    "logprobs over limit": ("sk-t", COMPLETIONS, completion(logprobs=21)),
    "all logprobs": ("sk-t", COMPLETIONS, completion(logprobs=-1)),
    "all prompt logprobs": ("sk-t", COMPLETIONS, completion(prompt_logprobs=-1)),
    "top logprobs over limit": ("sk-t", CHAT, chat(logprobs=True, top_logprobs=21)),
    "top logprobs alone": ("sk-t", CHAT, chat(top_logprobs=2)),
    "logprob ids over limit": ("sk-t", CHAT, chat(logprobs=True, logprob_token_ids=[1] * 21)),
    "no tokens": ("sk-t", COMPLETIONS, completion(max_tokens=0)),
    "negative tokens": ("sk-t", CHAT, chat(max_tokens=-5)),
    "stream as text": ("sk-t", CHAT, chat(stream="yes")),
    "unknown stream option": ("sk-t", CHAT, chat(stream=True, stream_options={"x": 1})),
    "stream options alone": ("sk-t", CHAT, chat(stream_options={"include_usage": True})),
    "many bad words": ("sk-t", CHAT, chat(bad_words=["x"] * 129)),
    "long bad words": ("sk-t", CHAT, chat(bad_words=["x" * 4097] * 2)),
    "many stop ids": ("sk-t", CHAT, chat(stop_token_ids=[1] * 101)),
    "many allowed ids": ("sk-t", CHAT, chat(allowed_token_ids=[1] * 1025)),
    "enormous top k": ("sk-t", CHAT, chat(top_k=10**20)),
    "enormous top k in responses": ("sk-t", RESPONSES, {"input": "x", "top_k": 10**20}),
    "seed that choices count on from": ("sk-t", CHAT, chat(n=2, seed=2**63 - 1)),
    "grammar of Lark": (
        "sk-t",
        COMPLETIONS,
        completion(structured_outputs={"grammar": 'start: "a"~2000000000  // root ::= "a"'}),
    ),
    "enormous stream interval": ("sk-t", COMPLETIONS, completion(stream=True, stream_interval=10**20)),
    "many stop strings": ("sk-t", CHAT, chat(stop=["a", "b", "c", "d", "e"])),
    "long cache salt": ("sk-t", CHAT, chat(cache_salt="s" * 129)),
    "hot temperature": ("sk-t", CHAT, chat(temperature="hot")),
    "no messages": ("sk-t", CHAT, {}),
    "empty messages": ("sk-t", CHAT, {"messages": []}),
    "message as text": ("sk-t", CHAT, {"messages": ["hello"]}),
    "unknown role": ("sk-t", CHAT, {"messages": [{"role": "root", "content": "x"}]}),
    "image": ("sk-t", CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}),
    "message field": ("sk-t", CHAT, {"messages": [{"role": "user", "content": "x", "y": 1}]}),
    "message audio": (
        "sk-t",
        CHAT,
        {"messages": [{"role": "assistant", "content": "x", "audio": {"id": "a"}}]},
    ),
    "input image": (
        "sk-t",
        RESPONSES,
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
    ),
    "input reference": ("sk-t", RESPONSES, {"input": [{"type": "item_reference", "id": "x"}]}),
    "large schema": ("sk-t", CHAT, chat(response_format=schema({"const": "x" * 17_000}))),
    "deep schema": ("sk-t", CHAT, chat(response_format=schema(DEEP))),
    "many items": ("sk-t", CHAT, chat(response_format=schema({"maxItems": 10**9}))),
    "long pattern": ("sk-t", CHAT, chat(response_format=schema({"pattern": "a{1,99999}"}))),
    "no schema": ("sk-t", CHAT, chat(response_format={"type": "json_schema"})),
    "structural tag": ("sk-t", CHAT, chat(response_format={"type": "structural_tag"})),
    "large grammar": (
        "sk-t",
        COMPLETIONS,
        completion(structured_outputs={"grammar": "x" * 17_000}),
    ),
    "regex bomb": ("sk-t", COMPLETIONS, completion(structured_outputs={"regex": "(a{1,9999}){9}"})),
    "grammar backend": ("sk-t", COMPLETIONS, completion(structured_outputs={"_backend": "x"})),
    "two constraints": (
        "sk-t",
        COMPLETIONS,
        completion(structured_outputs={"regex": "a", "choice": ["b"]}),
    ),
    "large text format": (
        "sk-t",
        RESPONSES,
        {
            "input": "x",
            "text": {"format": {"type": "json_schema", "name": "s", "schema": {"a": "x" * 17_000}}},
        },
    ),
    "tool of another type": ("sk-t", CHAT, chat(tools=[{"type": "web_search"}])),
    "built-in tool": ("sk-t", RESPONSES, {"input": "x", "tools": [{"type": "mcp"}]}),
    "auto tools": ("sk-t", CHAT, chat(tools=[TOOL])),
    "auto tools by name": ("sk-t", CHAT, chat(tools=[TOOL], tool_choice="auto")),
    "auto tools in responses": (
        "sk-t",
        RESPONSES,
        {"input": "x", "tools": [{"type": "function", "name": "f", "parameters": {}}]},
    ),
    "many tools": ("sk-t", CHAT, chat(tools=[TOOL] * 129, tool_choice="none")),
    "tool name": (
        "sk-t",
        RESPONSES,
        {"input": "x", "tools": [{"type": "function", "name": "f" * 65}], "tool_choice": "none"},
    ),
    "schema not enforced": ("sk-t", CHAT, chat(response_format=schema({"not": {"type": "null"}}))),
    "pattern not enforced": ("sk-t", COMPLETIONS, completion(structured_outputs={"regex": "(?=a)b"})),
    "repeats in all": ("sk-t", COMPLETIONS, completion(structured_outputs={"regex": "a{1,1000}" * 5})),
    "tool not enforced": (
        "sk-t",
        CHAT,
        chat(
            tools=[{"type": "function", "function": {"name": "f", "parameters": {"required": ["a"]}}}],
            tool_choice="required",
        ),
    ),
    "tool without an object": (
        "sk-t",
        CHAT,
        chat(
            tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}],
            tool_choice="required",
        ),
    ),
    "stop inside a call": ("sk-t", CHAT, chat(tools=[TOOL], tool_choice="required", stop=["{"])),
    "large tools": (
        "sk-t",
        CHAT,
        chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {"a": "x" * 17_000}}}]),
    ),
    "extension as text": ("sk-t", COMPLETIONS, completion(flexgate="all")),
    "unknown extension key": ("sk-t", COMPLETIONS, gate(expert=["math"])),
    "unknown request filter key": ("sk-t", COMPLETIONS, gate(experts={"allow": ["math"]})),
    "only as text": ("sk-t", COMPLETIONS, gate(experts={"only": "news"})),
    "unknown explain": ("sk-t", COMPLETIONS, gate(explain="all")),
    "version as text": ("sk-t", COMPLETIONS, gate(min_policy_version="8")),
    "version not reached": ("sk-t", COMPLETIONS, gate(min_policy_version=8)),
    "listed and not allowed": ("sk-t", COMPLETIONS, gate(experts={"only": ["math"]})),
    "unknown expert": ("sk-t", COMPLETIONS, gate(experts={"only": ["nonsense"]})),
    "hidden expert": ("sk-t", COMPLETIONS, gate(experts={"only": ["secret"]})),
    "unknown expert ignored": ("sk-t", COMPLETIONS, gate(experts={"ignore": ["nonsense"]})),
    "anchor ignored": ("sk-t", COMPLETIONS, gate(experts={"ignore": ["public"]})),
    "unknown purpose": ("sk-t", COMPLETIONS, gate(purpose="fun")),
    "unregistered purpose": ("sk-t", COMPLETIONS, gate(purpose="ai-train")),
    "unknown region": ("sk-t", COMPLETIONS, gate(region="Atlantis")),
    "tokens as text": ("sk-t", "/detokenize", {"tokens": "1 2"}),
    "tokenize nothing": ("sk-t", "/tokenize", {}),
    "tokenize with a template": ("sk-t", "/tokenize", {"messages": HELLO, "chat_template": "x"}),
    "unknown path": ("sk-t", "/v1/embeddings", {}),
    "vLLM's own paths": ("sk-t", "/inference/v1/generate", {}),
    "wrong method": ("sk-t", "/v1/models", {}),
}


async def answer(make_client: Callable[..., httpx.AsyncClient], name: str) -> httpx.Response:
    key, path, body = CASES[name]
    async with make_client(key) as http:
        headers = {"content-type": "application/json"}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await http.post(path, content=content, headers=headers)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    if os.environ.get("FLEXGATE_WRITE_GOLDEN"):
        return {}
    said: dict[str, Any] = json.loads(GOLDEN.read_text())
    return said


@pytest.mark.asyncio
@pytest.mark.parametrize("name", CASES)
async def test_refusal_says_exactly_this(
    make_client: Callable[..., httpx.AsyncClient], handler: Any, golden: dict[str, Any], name: str
) -> None:
    response = await answer(make_client, name)
    said = {"status": response.status_code, "body": response.json()}
    if os.environ.get("FLEXGATE_WRITE_GOLDEN"):
        golden[name] = said
        GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")
        return
    assert said == golden[name]
    assert not handler.seen, "a refused request reached a handler"


def test_the_golden_file_has_exactly_these_cases(golden: dict[str, Any]) -> None:
    assert set(golden) == set(CASES) or os.environ.get("FLEXGATE_WRITE_GOLDEN")


def test_every_refusal_has_the_one_shape(golden: dict[str, Any]) -> None:
    for name, said in golden.items():
        body = dict(said["body"])
        error = body.pop("error")
        assert error.keys() == {"message", "type", "param", "code"}, name
        assert isinstance(error["message"], str), name
        assert error["message"], name
        assert error["code"] is None or isinstance(error["code"], str), name
        assert error["type"] in ("invalid_request_error", "request_forbidden", "server_error")
        assert not body or name == "listed and not allowed"
        assert said["status"] >= 400


def test_a_field_at_fault_is_named(golden: dict[str, Any]) -> None:
    unnamed = {name for name, said in golden.items() if said["body"]["error"]["param"] is None}
    assert unnamed == {
        *("no key", "wrong key", "revoked key", "expired key", "malformed JSON", "no object"),
        *("admin key cannot infer", "owner key cannot infer", "auditor key cannot tokenize"),
        *("too large", "unknown path", "vLLM's own paths", "wrong method"),
    }


@pytest.mark.asyncio
async def test_hidden_and_unknown_experts_are_refused_byte_for_byte_alike(
    make_client: Callable[..., httpx.AsyncClient],
) -> None:
    hidden = await answer(make_client, "hidden expert")
    unknown = await answer(make_client, "unknown expert")
    assert hidden.content == unknown.content
    own = "x-request-id"
    assert {k: v for k, v in hidden.headers.items() if k != own} == {
        k: v for k, v in unknown.headers.items() if k != own
    }


@pytest.mark.asyncio
async def test_a_checkpoint_without_chat_template_says_which_option_helps(
    client: httpx.AsyncClient, services: Any
) -> None:
    services.handlers.has_chat_template = False
    for path, body in (
        (CHAT, chat()),
        (RESPONSES, {"input": "x"}),
        ("/tokenize", {"messages": HELLO}),
    ):
        response = await client.post(path, json=body)
        assert response.status_code == 400
        assert "--chat-template" in response.json()["error"]["message"]
