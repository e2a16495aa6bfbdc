import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from flexgate.server.engine.client import (
    CURRENT_CALL,
    ExpertInfo,
    ExpertLease,
    GatedCall,
    GatedEngineClient,
    GateGrant,
)
from flexgate.server.engine.gates import GateError, new_seal_key


def salt(*leases: ExpertLease, tenant: str = "t", client_salt: str | None = None) -> str:
    """The salt under which a call goes out; making it needs no engine."""
    client = object.__new__(GatedEngineClient)
    client._key = KEY
    return client._gate(GatedCall(GateGrant(tenant, leases, math.inf), client_salt), "request").cache_salt


KEY = new_seal_key()


def test_the_salt_names_experts_and_generations_and_no_slot() -> None:
    public, news = ExpertLease("public", 0, 1), ExpertLease("news", 1, 1)
    assert salt(public, news) == salt(public, ExpertLease("news", 5, 1))
    others = {
        salt(public),
        salt(public, ExpertLease("math", 1, 1)),
        salt(public, ExpertLease("news", 1, 2)),
        salt(public, news, tenant="u"),
        salt(public, news, client_salt="c"),
    }
    assert len(others | {salt(public, news)}) == 6


def test_nothing_goes_out_without_a_call() -> None:
    client = object.__new__(GatedEngineClient)
    with pytest.raises(GateError, match="outside of an admitted call"):
        client.generate({"prompt_token_ids": [1]}, None, "request")  # type: ignore[arg-type]


class Engine:
    """vLLM's own output processor without an engine core: a test says what is generated."""

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(hf_config=SimpleNamespace(num_hidden_layers=2))
        self.output_processor = OutputProcessor(None, log_stats=False)
        self.children: list[str] = []

    async def generate(self, prompt: Any, params: SamplingParams, request_id: str, **_: Any) -> AsyncIterator[Any]:
        """Hand over one request, or one for each choice, and answer from the queue, as `AsyncLLM` does."""
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
        finished = False
        while not finished:
            output = await queue.get()
            finished = output.finished
            yield output

    def step(self, *tokens: int, finish: bool = False) -> None:
        """One step in which every request gets these tokens."""
        reason = FinishReason.LENGTH if finish else None
        outputs = [EngineCoreOutput(child, list(tokens), finish_reason=reason) for child in self.children]
        self.output_processor.process_outputs(outputs)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def call(engine: Engine) -> Iterator[GatedCall]:
    """A call that is current."""
    made = GatedCall(GateGrant("t", (ExpertLease("public", 0, 1),), math.inf))
    token = CURRENT_CALL.set(made)
    yield made
    CURRENT_CALL.reset(token)


async def begin(engine: Engine, call: GatedCall, kind: RequestOutputKind, n: int) -> "asyncio.Task[None]":
    client = GatedEngineClient(engine, key=KEY, experts=(ExpertInfo("public", "o", "", 0, 1, True),), slots=1)
    CURRENT_CALL.set(call)
    params = SamplingParams(n=n, max_tokens=9, output_kind=kind, detokenize=False)

    async def read() -> None:
        async for _ in client.generate({"prompt_token_ids": [1, 2, 3]}, params, "request"):
            pass

    task = asyncio.ensure_future(read())
    while len(engine.children) < n:
        assert not task.done()
        await asyncio.sleep(0)
    return task


@pytest.mark.asyncio
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", list(RequestOutputKind), ids=lambda kind: kind.name)
async def test_what_is_generated_counts_whether_or_not_anybody_reads_it(
    engine: Engine, call: GatedCall, kind: RequestOutputKind, n: int
) -> None:
    """The prompt from the moment the engine has it, once for all choices; each token as it comes."""
    reading = await begin(engine, call, kind, n)
    assert call.tokens() == 3
    engine.step(7)
    engine.step(8)
    assert call.tokens() == 3 + 2 * n
    engine.step(9, finish=True)
    assert call.tokens() == 3 + 3 * n
    await reading


@pytest.mark.asyncio
async def test_who_leaves_before_the_only_output_is_charged_for_what_there_was(engine: Engine, call: GatedCall) -> None:
    reading = await begin(engine, call, RequestOutputKind.FINAL_ONLY, 1)
    engine.step(7)
    reading.cancel()
    await asyncio.wait({reading})
    engine.step(8)
    assert call.tokens() == 4
