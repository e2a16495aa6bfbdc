"""Limits of one request, checked on the JSON before vLLM sees it: those that all share, and chat's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from flexgate.server.inference.request import fields
from flexgate.server.inference.request.grammars import check_constraint, check_format
from flexgate.server.inference.request.messages import check_conversation, check_tool_choice, cuts
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
        has_tool_parser: whether the model may choose to call a tool: something reads the calls it writes.
        prompt_tokens: the model's length.
        prompt_chars: of a prompt, of an input, or of all messages, with tools: more
            cannot fit into `prompt_tokens`, whatever the text.
    """

    n: int = 8
    prompts: int = 16
    logprobs: int = 20
    grammar_bytes: int = 16 * 1024
    has_tool_parser: bool = False
    prompt_tokens: int = 1 << 20
    prompt_chars: int = 1 << 20


def check_chat(body: Body, limits: Limits) -> None:
    """Refuse a chat request over its limits, or with something to fetch."""
    check_generation(body, limits)
    integer(body, "max_completion_tokens", 1)
    integer(body, "max_tokens", 1)
    if boolean(body, "logprobs") is None and body.get("top_logprobs"):
        invalid("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
    integer(body, "top_logprobs", 0, limits.logprobs)
    check_conversation(body, limits, measure=cuts(body))
    check_tool_choice(body, has_parser=limits.has_tool_parser)


def check_generation(body: Body, limits: Limits) -> None:
    """Refuse what chat and completion requests share over its limits."""
    check_sampling(body, limits)
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
        if options and not body.get("stream"):
            invalid("'stream_options' needs 'stream': true.", "stream_options")


def _stream_options(options: Mapping[str, Any]) -> Body:
    under = "stream_options"
    kept = keep_honoured(options, fields.STREAM_OPTIONS, under=(under,))
    for name, value in kept.items():
        if type(value) is not bool:
            invalid(f"'{under}.{name}' must be true or false.", f"{under}.{name}")
    return kept


def check_sampling(body: Body, limits: Limits) -> None:
    """Refuse what every generating request shares over its limits."""
    check_flags(body)
    text(body, "model", longest=256)
    text(body, "cache_salt", longest=MAX_CACHE_SALT)
    integer(body, "top_k", -1, MAX_INTEGER)
    integer(body, "seed", -(1 << 63), (1 << 63) - 1 - limits.n, why=": each further choice adds one to it")
    for name, most in _LISTS.items():
        sized(body, name, most=most)
    if (count := characters(body.get("bad_words"))) > MAX_BAD_WORDS_CHARACTERS:
        too_much(f"'bad_words' may have at most {MAX_BAD_WORDS_CHARACTERS} characters, not {count}.", "bad_words")
    constraint = body.get("structured_outputs")
    if constraint is not None:
        body["structured_outputs"] = check_constraint(constraint, longest=limits.grammar_bytes)


def check_flags(body: Body) -> None:
    """Refuse flags that are neither true nor false."""
    for name in _FLAGS:
        boolean(body, name)
