"""vLLM's handlers, whose answers are made later: making one takes as long as the engine's outputs are many.

A short request can ask for an answer of hundreds of thousands of log-probabilities. vLLM makes objects of all of them
in one piece; here that piece is given back, to be made where it holds nobody up. Streams read the engine's outputs as
`Outputs`, so that their pieces can be.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any

from flexgate.server.engine.seam.frontend import PromptLogprobs
from flexgate.server.engine.seam.handlers import OpenAIServingChat, OpenAIServingCompletion, OpenAIServingResponses
from flexgate.server.inference.openai.streaming import Outputs


class Later:
    """An answer that is still to be made, of all that the engine gave."""

    def __init__(self, make: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self.make = make


class LaterChat(OpenAIServingChat):
    """Chat answers."""

    async def chat_completion_full_generator(
        self, request: Any, result_generator: AsyncIterator[Any], *args: Any, **options: Any
    ) -> Any:
        """The answer, to be made later."""
        last = [output async for output in result_generator][-1:]
        return Later(partial(super().chat_completion_full_generator, request, _again(last), *args, **options))

    def chat_completion_stream_generator(
        self, request: Any, result_generator: AsyncGenerator[Any, None], *args: Any, **options: Any
    ) -> Any:
        """The events."""
        return super().chat_completion_stream_generator(request, Outputs(result_generator), *args, **options)


class LaterResponses(OpenAIServingResponses):
    """Responses answers; vLLM's context keeps the outputs as they come."""

    async def responses_full_generator(
        self, request: Any, sampling_params: Any, result_generator: AsyncIterator[Any], *args: Any, **options: Any
    ) -> Any:
        """The answer, to be made later; a stream's last event has it at once."""
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
    """Completion answers."""

    def request_output_to_completion_response(self, outputs: list[Any], *args: Any, **options: Any) -> Any:
        """The answer, to be made later."""
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
