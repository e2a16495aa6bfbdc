"""What a completion may ask for: texts or token ids, within limits."""

from __future__ import annotations

from typing import Any, Final

from flexgate.server.http.errors import CONTEXT_LENGTH_EXCEEDED, PROMPT_TOO_LONG, Invalid
from flexgate.server.inference.request.limits import Body, Limits, check_generation
from flexgate.server.inference.request.messages import bad, check_length, cuts
from flexgate.server.inference.request.values import integer, invalid, too_much

_PROMPT: Final = "a string, a list of strings, a list of token ids (integers), or a list of such lists"


def check_completion(body: Body, limits: Limits) -> None:
    """Refuse a completion request over its limits."""
    check_generation(body, limits)
    integer(body, "max_tokens", 0 if body.get("echo") else 1)
    integer(body, "logprobs", 0, limits.logprobs)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > limits.prompts and isinstance(prompt[0], str | list):
        too_much(f"A request may have at most {limits.prompts} prompts, not {len(prompt)}.", "prompt")
    body["prompt"] = read_prompts(prompt)
    for one in body["prompt"]:
        if isinstance(one, list):
            _check_ids(one, limits)
        elif cuts(body):
            check_length("prompt", limits, one)


def read_prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts of a completion, each a text or token ids; a list of ids is one prompt."""
    if prompt is None:
        invalid("'prompt' is required.", "prompt")
    if prompt in ("", []):
        invalid("'prompt' must not be empty.", "prompt")
    if isinstance(prompt, str) or _are_ids(prompt):
        return [prompt]
    if not isinstance(prompt, list):
        invalid(f"'prompt' must be {_PROMPT}.", "prompt")
    for position, one in enumerate(prompt):
        if not (isinstance(one, str) or _are_ids(one)):
            bad("must be a string or a list of token ids", ("prompt", position))
    return prompt


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) == {int}


def _check_ids(ids: list[int], limits: Limits) -> None:
    """Refuse more token ids than a text that could fit has characters."""
    if len(ids) > limits.prompt_chars:
        raise Invalid(
            f"{PROMPT_TOO_LONG}: 'prompt' may have at most {limits.prompt_chars} token ids, not {len(ids)}: "
            f"this model's context has {limits.prompt_tokens}.",
            param="prompt",
            code=CONTEXT_LENGTH_EXCEEDED,
        )
