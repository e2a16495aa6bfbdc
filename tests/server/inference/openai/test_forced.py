"""Forced tool calls: what constrained decoding lets a model answer, and what is not forced stays as it was."""

from __future__ import annotations

import json
from typing import Any

import pytest
import xgrammar
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError
from vllm.parser.abstract_parser import DelegatingParser

from flexgate.server.engine.frontend.constraints.made import Constraint
from flexgate.server.inference.openai.forced import MAX_CALLS, ConstrainedToolParser, complete_calls, read_cut_lists

TOKENIZER = xgrammar.TokenizerInfo([*(bytes([byte]) for byte in range(256)), b"<end>"], stop_token_ids=[256])
COMPILER = xgrammar.GrammarCompiler(TOKENIZER, max_threads=1, cache_enabled=False)

CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Oslo"]}}, "required": ["city"]}
TREE = {"type": "object", "properties": {"of": {"$ref": "#"}}}
NUMBERED = {
    "type": "object",
    "properties": {"n": {"$ref": "#/$defs/number"}},
    "required": ["n"],
    "$defs": {"number": {"type": "integer"}},
}
NAMED = {**NUMBERED, "$defs": {"number": {"type": "string", "maxLength": 2}}}
TOOLS: dict[str, Any] = {"weather": CITY, "tree": TREE, "numbered": NUMBERED, "named": NAMED, "bare": None}


def chat(choice: Any, **fields: Any) -> Any:
    functions = [{"name": name, "parameters": schema} for name, schema in TOOLS.items()]
    tools = [{"type": "function", "function": function} for function in functions]
    if isinstance(choice, str) and choice not in ("auto", "none", "required"):
        choice = {"type": "function", "function": {"name": choice}}
    messages = [{"role": "user", "content": "x"}]
    return ChatCompletionRequest.model_validate({"messages": messages, "tools": tools, "tool_choice": choice, **fields})


def responses(choice: Any, **fields: Any) -> Any:
    tools = [{"type": "function", "name": name, "parameters": schema} for name, schema in TOOLS.items()]
    if choice not in ("auto", "none", "required"):
        choice = {"type": "function", "name": choice}
    return ResponsesRequest.model_validate({"input": "x", "tools": tools, "tool_choice": choice, **fields})


def adjusted(request: Any) -> Any:
    return ConstrainedToolParser(None).adjust_request(request)  # type: ignore[arg-type] # it reads no tokens


def allows(request: Any, answer: Any) -> bool:
    """Whether a model may give this answer to an adjusted request, and end there."""
    constraint = Constraint.made(request.to_sampling_params(100, {}).structured_outputs)
    grammar = COMPILER.compile_json_schema(constraint.text, any_whitespace=False, separators=(",", ":"))
    matcher = xgrammar.GrammarMatcher(grammar)
    text = json.dumps(answer, separators=(",", ":"))
    return bool(matcher.accept_string(text) and matcher.accept_token(256))


def call(name: str, parameters: Any) -> dict[str, Any]:
    return {"name": name, "parameters": parameters}


PARIS = call("weather", {"city": "Paris"})


@pytest.mark.parametrize("made", [chat, responses])
def test_required_lets_a_model_call_any_tool_by_its_own_schema(made: Any) -> None:
    request = adjusted(made("required"))
    deep = {"of": {"of": {}}}
    for calls in ([PARIS], [call("tree", deep)], [call("numbered", {"n": 3}), call("named", {"n": "ab"})]):
        assert allows(request, calls), calls
    assert allows(request, [call("bare", {})])
    wrong: list[Any] = [None, {}, [], [call("other", {})], [call("weather", None)], [call("weather", {"city": "Rome"})]]
    wrong += [[call("numbered", {"n": "a"})], [call("named", {"n": "abc"})], [call("tree", {"of": [PARIS]})]]
    for calls in wrong:
        assert not allows(request, calls), calls


@pytest.mark.parametrize("made", [chat, responses])
def test_the_calls_of_one_answer_have_an_end(made: Any) -> None:
    request = adjusted(made("required"))
    assert allows(request, [PARIS] * MAX_CALLS)
    assert not allows(request, [PARIS] * (MAX_CALLS + 1))
    alone = adjusted(made("required", parallel_tool_calls=False))
    assert allows(alone, [PARIS])
    assert not allows(alone, [PARIS] * 2)


@pytest.mark.parametrize("made", [chat, responses])
def test_a_named_tool_gets_the_arguments_of_its_schema(made: Any) -> None:
    request = adjusted(made("weather"))
    assert allows(request, {"city": "Oslo"})
    assert not allows(request, None)
    assert not allows(request, {"city": "Rome"})
    assert allows(adjusted(made("bare")), {})


def test_a_forced_call_comes_before_a_format_of_the_answer() -> None:
    form = {"type": "json_schema", "name": "a", "schema": {"type": "boolean"}}
    request = adjusted(responses("weather", text={"format": form}))
    assert allows(request, {"city": "Oslo"})
    request = adjusted(chat("weather", response_format={"type": "json_object"}))
    assert allows(request, {"city": "Oslo"})


def test_a_tool_that_is_not_there_is_refused() -> None:
    for made in (chat, responses):
        with pytest.raises(VLLMValidationError, match="tool"):
            made("nope")


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_what_is_not_forced_is_not_constrained(choice: str) -> None:
    for request in (adjusted(chat(choice)), adjusted(responses(choice))):
        assert request.to_sampling_params(100, {}).structured_outputs is None


def test_a_call_that_is_nested_deeper_than_can_be_read_counts_as_cut_off() -> None:
    call = '{"name": "a", "parameters": {}}'
    deep = '{"name": "a", "parameters": ' + '{"a": ' * 100_000
    assert json.loads(complete_calls(f"[{call}, {deep}")) == [json.loads(call)]


def test_of_a_list_that_was_cut_off_the_complete_calls_are_read() -> None:
    made = [call("look", {"text": 'a "b", [c'}), call("count", {"n": 2})]
    text = json.dumps(made, separators=(",", ":"))
    first = len(json.dumps(made[:1], separators=(",", ":"))) - 1  # without its end
    for length in range(len(text) + 1):
        read = json.loads(complete_calls(text[:length]))
        assert read == made[: 2 if length >= len(text) - 1 else 1 if length >= first else 0], text[:length]


@pytest.mark.parametrize("cut", [0, 1, 30])
def test_an_answer_that_was_cut_off_at_its_length_keeps_its_complete_calls(cut: int) -> None:
    class Usual(DelegatingParser):
        tool_parser_cls = ConstrainedToolParser

    request = chat("required")
    text = json.dumps([PARIS, call("numbered", {"n": 3})])
    parser = read_cut_lists(Usual)(None, request.tools)
    made, rest = parser._extract_tool_calls(text[: len(text) - cut], request, True)
    assert [one.name for one in made] == ["weather", "numbered"][: 2 if cut < 2 else 1]
    assert json.loads(made[0].arguments) == {"city": "Paris"}
    assert rest is None
