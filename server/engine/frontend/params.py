"""What sampling parameters can cost, beyond what vLLM itself counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flexgate.server.engine.seam.engine import VLLMValidationError, envs

if TYPE_CHECKING:
    from flexgate.server.engine.seam.engine import SamplingParams


def refuse_many_bad_words(params: SamplingParams, tokenizer: Any) -> None:
    """Refuse more than Model Runner V2 holds (vllm/v1/worker/gpu/sample/bad_words.py): it would end the engine."""
    params.update_from_tokenizer(tokenizer)
    tokens = sum(map(len, params.bad_words_token_ids or ()))
    most = envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS
    if tokens > most:
        raise VLLMValidationError(
            f"'bad_words' may have at most {most} tokens, with a space before each word and without, not {tokens}.",
            parameter="bad_words",
        )
