"""What the API process starts vLLM with. Kept apart, since no other process of the engine loads it.

``AsyncLLM``, ``AsyncEngineArgs``, ``StructuredOutputsConfig``, ``RequestOutput``
    Public.
``set_ulimit`` (vllm/utils/system_utils.py)
    Raises the limit of open files, as vLLM's own server does.
``LogprobsProcessor._update_prompt_logprobs`` (vllm/v1/engine/logprobs.py)
    Makes an object of each log-probability of a prompt, on the event loop, when the engine core's arrays arrive.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, overload

from vllm.config import StructuredOutputsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import RequestOutput
from vllm.utils.system_utils import set_ulimit
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.logprobs import LogprobsProcessor

__all__ = [
    "AsyncEngineArgs",
    "AsyncLLM",
    "PromptLogprobs",
    "RequestOutput",
    "StructuredOutputsConfig",
    "make_prompt_logprobs_later",
    "set_ulimit",
]

_make = LogprobsProcessor._update_prompt_logprobs


class PromptLogprobs(Sequence[Any]):
    """Log-probabilities of a prompt, which vLLM makes of the engine's arrays once they are read, in any thread."""

    def __init__(self, processor: LogprobsProcessor) -> None:
        self._processor = copy.copy(processor)  # has vLLM's own beginning: nothing for the first token
        self._parts: list[Any] = []
        self._positions = len(processor.prompt_logprobs or ())

    def add(self, part: Any) -> None:
        """The arrays of further tokens of the prompt."""
        self._parts.append(part)
        self._positions += len(part.logprobs)

    def of_prompt(self) -> list[float]:
        """The log-probability of each token of the prompt but the first; to be read before anything else is."""
        return [value for part in self._parts for value in part.logprobs[:, 0].tolist()]

    def made(self) -> list[Any]:
        """vLLM's own list."""
        parts, self._parts = self._parts, []
        for part in parts:
            _make(self._processor, part)
        return self._processor.prompt_logprobs

    def __len__(self) -> int:
        return self._positions

    def __iter__(self) -> Iterator[Any]:
        return iter(self.made())

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: Any) -> Any:
        return self.made()[index]


def make_prompt_logprobs_later() -> None:
    """Give out the log-probabilities of prompts as `PromptLogprobs` in this process."""

    def keep(self: LogprobsProcessor, part: Any) -> None:
        if not isinstance(self.prompt_logprobs, PromptLogprobs):
            self.prompt_logprobs = PromptLogprobs(self)
        self.prompt_logprobs.add(part)

    LogprobsProcessor._update_prompt_logprobs = keep
