"""An engine without an engine core, for what stands before it."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from flexgate.server.engine.protocol.names import GATE_ARG


class Characters:
    """A tokenizer of one token for each character."""

    max_token_id = 1 << 16

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(character) for character in text]


class Engine:
    """vLLM's own output processor without an engine core: a test says what is generated."""

    def __init__(self) -> None:
        self.vllm_config = self.input_processor = None
        self.model_config = SimpleNamespace(hf_config=SimpleNamespace(num_hidden_layers=2))
        self.output_processor = OutputProcessor(None, log_stats=False)
        self.renderer = SimpleNamespace(tokenizer=Characters())
        self.children: list[str] = []
        self.client: Any = None
        self.clock: Any = None
        self.sealed: list[Any] = []
        self.unreachable = False  # requests are taken and do not get to the engine core

    async def generate(self, prompt: Any, params: SamplingParams, request_id: str, **_: Any) -> AsyncIterator[Any]:
        """Hand over one request, or one for each choice, and answer from the queue, as `AsyncLLM` does."""
        self.sealed.append(params.extra_args[GATE_ARG])
        ids = prompt["prompt_token_ids"]
        request = EngineCoreRequest(f"{request_id}-r", ids, None, params, None, 0.0, None, None, None)
        request.external_req_id = request_id
        parent = ParentRequest(request) if params.n > 1 else None
        queue = RequestOutputCollector(params.output_kind, request.request_id)
        for index in range(params.n):
            child, child_params = parent.get_child_info(index) if parent else (request.request_id, params)
            made = EngineCoreRequest(child, ids, None, child_params, None, 0.0, None, None, None)
            made.external_req_id = request_id
            self.output_processor.add_request(made, None, parent, index, queue)
            self.children.append(child)
        if self.unreachable:
            raise OverflowError("an integer does not fit")
        finished = False
        while not finished:
            output = await queue.get()
            finished = output.finished
            yield output

    async def abort(self, request_id: str | list[str]) -> None:
        """As `AsyncLLM` does, without an engine core."""
        ids = [request_id] if isinstance(request_id, str) else request_id
        self.output_processor.abort_requests(ids, internal=False)

    def step(self, *tokens: int, finish: bool = False) -> None:
        """One step in which every request gets these tokens."""
        reason = FinishReason.LENGTH if finish else None
        outputs = [EngineCoreOutput(child, list(tokens), finish_reason=reason) for child in self.children]
        self.output_processor.process_outputs(outputs)
