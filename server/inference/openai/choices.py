"""Several choices of a greedy request: OpenAI answers them, vLLM's parameters refuse them when they are made."""

from __future__ import annotations

from typing import Any

from flexgate.server.engine.seam.openai import ChatCompletionRequest, CompletionRequest, SamplingParams


def _with_choices(params: SamplingParams, n: int) -> SamplingParams:
    params.n = n
    params.skip_clone = n > 1  # a deep copy is made, and refused, anew
    return params


class ChatRequest(ChatCompletionRequest):
    """vLLM's chat request, whose `n` holds at every temperature."""

    def to_sampling_params(self, *args: Any, **options: Any) -> SamplingParams:
        """vLLM's parameters for one choice, then for all."""
        one = self.model_copy(update={"n": 1})
        return _with_choices(ChatCompletionRequest.to_sampling_params(one, *args, **options), self.n or 1)


class TextRequest(CompletionRequest):
    """vLLM's completion request, whose `n` holds at every temperature."""

    def to_sampling_params(self, *args: Any, **options: Any) -> SamplingParams:
        """vLLM's parameters for one choice, then for all."""
        one = self.model_copy(update={"n": 1})
        return _with_choices(CompletionRequest.to_sampling_params(one, *args, **options), self.n or 1)
