"""What one request may ask for, per endpoint, checked on the JSON before vLLM sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from flexgate.server.http.errors import CONTEXT_LENGTH_EXCEEDED, PROMPT_TOO_LONG, Invalid
from flexgate.server.inference.request import fields
from flexgate.server.inference.request.grammars import (
    as_text,
    check_constraint,
    check_enforced,
    check_format,
    check_schema,
)
from flexgate.server.inference.request.messages import (
    check_tools,
    forces_a_call,
    read_input,
    read_messages,
    read_prompts,
)
from flexgate.server.inference.request.values import (
    boolean,
    characters,
    integer,
    invalid,
    keep_honoured,
    sized,
    text,
    too_much,
)

MAX_CACHE_SALT: Final = 128
# No more than vLLM's Model Runner V2 has room for, which ends the engine over one more: nothing of vLLM's counts before
# (MAX_NUM_… in vllm/v1/worker/gpu/sample/logit_bias.py; a model's own stop tokens come on top).
_LISTS: Final = {
    "stop": 4,
    "stop_token_ids": 100,
    "bad_words": 128,
    "logit_bias": 1024,
    "allowed_token_ids": 1024,
    "include": 16,  # vLLM tells of each member that is wrong
}
MAX_BAD_WORDS_CHARACTERS: Final = 8192
MAX_INTEGER: Final = (1 << 31) - 1
"""Of fields that have no bound of their own: a larger number breaks off a request on its way into the engine."""
_FLAGS: Final = tuple(
    name
    for line in (
        "stream echo ignore_eos skip_special_tokens spaces_between_special_tokens",
        "include_stop_str_in_output add_special_tokens add_generation_prompt",
        "continue_final_message return_tokens_as_token_ids return_token_ids",
        "return_prompt_text parallel_tool_calls return_token_strs",
    )
    for name in line.split()
)


Body = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What can be chosen, and what the model can hold.

    Attributes:
        grammar_bytes: of each schema, pattern and grammar.
        prompt_tokens: the model's length.
        prompt_chars: of a prompt, of an input, or of all messages, with tools: more is more than
            `prompt_tokens`, whatever the text.
    """

    n: int = 8
    prompts: int = 16
    logprobs: int = 20
    grammar_bytes: int = 16 * 1024
    prompt_tokens: int = 1 << 20
    prompt_chars: int = 1 << 20


def check_chat(body: Body, limits: Limits) -> None:
    """Refuse a chat request over its limits, or with something to fetch."""
    _check_generation(body, limits)
    integer(body, "max_completion_tokens", 1)
    integer(body, "max_tokens", 1)
    if boolean(body, "logprobs") is None and body.get("top_logprobs"):
        invalid("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
    integer(body, "top_logprobs", 0, limits.logprobs)
    _check_conversation(body, limits, measure=_cuts(body))


def check_completion(body: Body, limits: Limits) -> None:
    """Refuse a completion request over its limits."""
    _check_generation(body, limits)
    integer(body, "max_tokens", 0 if body.get("echo") else 1)
    integer(body, "logprobs", 0, limits.logprobs)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > limits.prompts and isinstance(prompt[0], str | list):
        too_much(f"'prompt' may have at most {limits.prompts} prompts, not {len(prompt)}.", "prompt")
    body["prompt"] = read_prompts(prompt)
    for one in body["prompt"]:
        if isinstance(one, list):
            _check_ids(one, limits)
        elif _cuts(body):
            _check_length("prompt", limits, one)


def check_responses(body: Body, limits: Limits) -> None:
    """Refuse a Responses request over its limits, or with something to fetch."""
    _check_sampling(body, limits)
    integer(body, "max_output_tokens", 1)
    integer(body, "top_logprobs", 0, limits.logprobs)
    body["input"] = read_input(body.get("input"))
    _check_tools(body, limits, flat=True)
    if _cuts(body):
        _check_length("input", limits, body["input"], body.get("instructions"), body.get("tools"))
    form = body.get("text")
    if isinstance(form, Mapping) and isinstance(form.get("format"), Mapping):
        check_format(form["format"], form["format"], "text.format", longest=limits.grammar_bytes)


def check_tokenize(body: Body, limits: Limits) -> None:
    """Refuse a tokenize request over its limits, or with something to fetch."""
    _check_flags(body)
    if "messages" in body:
        _check_conversation(body, limits, measure=True)
    elif not isinstance(body.get("prompt"), str):
        invalid("'prompt' must be a string.", "prompt")
    else:
        _check_length("prompt", limits, body["prompt"])


def check_detokenize(body: Body, limits: Limits) -> None:
    """Refuse tokens that are no list, or more than the model can hold."""
    if not isinstance(body.get("tokens"), list):
        invalid("'tokens' must be a list of token ids.", "tokens")
    sized(body, "tokens", most=limits.prompt_tokens)


def _check_conversation(body: Body, limits: Limits, *, measure: bool) -> None:
    body["messages"] = read_messages(body.get("messages"))
    _check_tools(body, limits, flat=False)
    if measure:
        _check_length("messages", limits, body["messages"], body.get("tools"))


def _cuts(body: Body) -> bool:
    """Whether a prompt may be longer than the model: vLLM makes tokens of all of it then, and refuses it else."""
    return body.get("truncate_prompt_tokens") is not None or body.get("truncation") not in (None, "disabled")


def _check_length(name: str, limits: Limits, *texts: Any) -> None:
    """Refuse text of which the model can hold a part at most, before the one thread that makes tokens of it has it."""
    count = characters(texts)
    if count > limits.prompt_chars:
        raise Invalid(
            f"{PROMPT_TOO_LONG}: '{name}' may have at most {limits.prompt_chars} characters, not {count}: "
            f"the {limits.prompt_tokens} tokens of this model cannot hold more.",
            param=name,
            code=CONTEXT_LENGTH_EXCEEDED,
        )


def _check_ids(ids: list[int], limits: Limits) -> None:
    """Refuse more token ids than a text that could fit has characters."""
    if len(ids) > limits.prompt_chars:
        raise Invalid(
            f"{PROMPT_TOO_LONG}: 'prompt' may have at most {limits.prompt_chars} token ids, not {len(ids)}: "
            f"this model's context has {limits.prompt_tokens}.",
            param="prompt",
            code=CONTEXT_LENGTH_EXCEEDED,
        )


def _check_generation(body: Body, limits: Limits) -> None:
    _check_sampling(body, limits)
    integer(body, "n", 1, limits.n)
    integer(body, "prompt_logprobs", 0, limits.logprobs)
    integer(body, "min_tokens", 0)
    integer(body, "stream_interval", 1, MAX_INTEGER)
    sized(body, "logprob_token_ids", most=limits.logprobs)
    form = body.get("response_format")
    if isinstance(form, Mapping):
        check_format(form, form.get("json_schema"), "response_format", longest=limits.grammar_bytes)
    options = body.get("stream_options")
    if isinstance(options, Mapping):
        body["stream_options"] = _stream_options(options)


def _stream_options(options: Mapping[str, Any]) -> Body:
    under = "stream_options"
    kept = keep_honoured(options, fields.STREAM_OPTIONS, under=(under,))
    for name, value in kept.items():
        if type(value) is not bool:
            invalid(f"'{under}.{name}' must be true or false.", f"{under}.{name}")
    return kept


def _check_sampling(body: Body, limits: Limits) -> None:
    _check_flags(body)
    text(body, "model", longest=256)
    text(body, "cache_salt", longest=MAX_CACHE_SALT)
    integer(body, "top_k", -1, MAX_INTEGER)
    integer(body, "seed", -(1 << 63), (1 << 63) - 1 - limits.n)  # each choice counts on from it, in 64 bits
    for name, most in _LISTS.items():
        sized(body, name, most=most)
    if (count := characters(body.get("bad_words"))) > MAX_BAD_WORDS_CHARACTERS:
        too_much(f"'bad_words' may have at most {MAX_BAD_WORDS_CHARACTERS} characters, not {count}.", "bad_words")
    constraint = body.get("structured_outputs")
    if constraint is not None:
        body["structured_outputs"] = check_constraint(constraint, longest=limits.grammar_bytes)


def _check_flags(body: Body) -> None:
    for name in _FLAGS:
        boolean(body, name)


def _check_tools(body: Body, limits: Limits, *, flat: bool) -> None:
    tools = body.get("tools")
    if tools is None:
        return
    check_tools(tools, flat=flat)
    functions = [tool if flat else tool["function"] for tool in tools]
    places = [f"tools[{position}].{'parameters' if flat else 'function.parameters'}" for position in range(len(tools))]
    schemas = [function.get("parameters") or {} for function in functions]
    total = 0
    for schema, param in zip(schemas, places, strict=True):
        total += len(as_text(check_schema(schema, param, longest=limits.grammar_bytes), param).encode())
        if total > limits.grammar_bytes:
            too_much(f"'tools' may have at most {limits.grammar_bytes} bytes of schemas.", "tools")
    for schema, param, function in zip(schemas, places, functions, strict=True):
        if schema and (forces_a_call(body) or function.get("strict")):
            written = check_enforced(schema, param, longest=limits.grammar_bytes)
            if written.get("type") != "object":
                invalid(f"'{param}' must have the type 'object'.", param)
