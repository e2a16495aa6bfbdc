"""vLLM's request types, renderer and handlers, where this server needs other behaviour.

Several choices of a greedy request: OpenAI generates them, vLLM's parameters refuse them when they are made.

A short request can ask for a response of hundreds of thousands of log-probabilities, and a large one be rendered to a
prompt for long. vLLM does both in one piece; here a prompt is made, and the response given back to be made, where it
holds up no other request. Streams read the engine's outputs as `Outputs`, so that their pieces can be.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any

from flexgate.server.engine.seam.frontend import PromptLogprobs
from flexgate.server.engine.seam.handlers import (
    OnlineRenderer,
    OpenAIServingChat,
    OpenAIServingCompletion,
    OpenAIServingResponses,
)
from flexgate.server.engine.seam.openai import ChatCompletionRequest, CompletionRequest, SamplingParams
from flexgate.server.http.offload import Offload
from flexgate.server.inference.openai.streaming import Outputs


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


class OffloadedRenderer(OnlineRenderer):
    """vLLM's renderer, which makes prompts of large bodies away from the event loop."""

    def __init__(self, offload: Offload, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._offload = offload

    async def render_chat(self, *args: Any, **options: Any) -> Any:
        """The prompt of a chat request."""
        return await self._offload.run(super().render_chat, *args, **options)

    async def render_responses(self, *args: Any, **options: Any) -> Any:
        """The prompt of a Responses request."""
        return await self._offload.run(super().render_responses, *args, **options)

    async def render_completion(self, *args: Any, **options: Any) -> Any:
        """The prompts of a completion request."""
        return await self._offload.run(super().render_completion, *args, **options)


class Later:
    """A response that is still to be made from the engine's outputs."""

    def __init__(self, make: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self._make: Callable[[], Coroutine[Any, Any, Any]] | None = make

    def take(self) -> Coroutine[Any, Any, Any]:
        """Make it, once. What waits for it is then alone in holding the engine's outputs."""
        make, self._make = self._make, None
        assert make is not None, "a response is made once"
        return make()


class LaterChat(OpenAIServingChat):
    """Chat responses, made later."""

    async def chat_completion_full_generator(
        self, request: Any, result_generator: AsyncIterator[Any], *args: Any, **options: Any
    ) -> Any:
        """The response, to be made later."""
        last = [output async for output in result_generator][-1:]
        return Later(partial(super().chat_completion_full_generator, request, _again(last), *args, **options))

    def chat_completion_stream_generator(
        self, request: Any, result_generator: AsyncGenerator[Any, None], *args: Any, **options: Any
    ) -> Any:
        """The events."""
        return super().chat_completion_stream_generator(request, Outputs(result_generator), *args, **options)


class LaterResponses(OpenAIServingResponses):
    """Responses of the Responses API, made later; vLLM's context keeps the outputs as they come."""

    async def responses_full_generator(
        self, request: Any, sampling_params: Any, result_generator: AsyncIterator[Any], *args: Any, **options: Any
    ) -> Any:
        """The response, to be made later; a stream's last event has it at once."""
        if request.stream:
            return await super().responses_full_generator(request, sampling_params, result_generator, *args, **options)
        async for _ in result_generator:
            pass
        return Later(partial(super().responses_full_generator, request, sampling_params, _again([]), *args, **options))

    def responses_stream_generator(
        self,
        request: Any,
        sampling_params: Any,
        result_generator: AsyncGenerator[Any, None],
        *args: Any,
        **options: Any,
    ) -> Any:
        """The events."""
        outputs: Any = Outputs(result_generator)
        return super().responses_stream_generator(request, sampling_params, outputs, *args, **options)


class LaterCompletion(OpenAIServingCompletion):
    """Completion responses, made later."""

    def request_output_to_completion_response(self, outputs: list[Any], *args: Any, **options: Any) -> Any:
        """The response, to be made later."""
        make = super().request_output_to_completion_response

        async def made() -> Any:
            return make([output async for output in _again(outputs)], *args, **options)

        return Later(made)

    def completion_stream_generator(
        self, request: Any, prompts: Any, result_generator: AsyncGenerator[Any, None], *args: Any, **options: Any
    ) -> Any:
        """The events."""
        outputs: Any = Outputs(result_generator)
        return super().completion_stream_generator(request, prompts, outputs, *args, **options)


async def _again(outputs: list[Any]) -> AsyncIterator[Any]:
    """The engine's outputs, with vLLM's own lists of log-probabilities."""
    for output in outputs:
        if isinstance(output.prompt_logprobs, PromptLogprobs):
            output.prompt_logprobs = output.prompt_logprobs.made()
        yield output
