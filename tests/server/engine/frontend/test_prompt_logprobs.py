"""What a client gets of its prompt: the scores of its tokens, and nothing where only the prompt was asked for."""

import asyncio
import math

import pytest
import torch
from clocks import Clock
from scripted_engine import Engine
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.outputs import LogprobsTensors

from flexgate.server.engine.frontend.calls import CURRENT_CALL, ExpertInfo, GatedCall
from flexgate.server.engine.frontend.client import GatedEngineClient
from flexgate.server.engine.protocol.gates import new_seal_key
from flexgate.server.engine.protocol.slots import SlotMap
from flexgate.server.engine.seam.frontend import PromptLogprobs

KEY = new_seal_key()
INFO = ExpertInfo("public", "o", "", 0, 1, True)
ONE = SlotMap(1, (b"\0",))


@pytest.fixture
def engine(clock: Clock) -> Engine:
    made = Engine()
    made.clock = clock
    return made


def scored(child: str, *tokens: int, prompt: int = 0) -> EngineCoreOutput:
    """An output with log-probabilities of the last `prompt` tokens of its prompt."""
    if not prompt:
        return EngineCoreOutput(child, list(tokens))
    shape = (prompt, 2)
    scores = LogprobsTensors(torch.ones(shape, dtype=torch.int32), torch.zeros(shape), torch.ones(prompt))
    return EngineCoreOutput(child, list(tokens), new_prompt_logprobs_tensors=scores)


@pytest.mark.asyncio
async def test_no_choice_loses_the_scores_of_its_prompt_where_outputs_wait_to_be_read(engine: Engine) -> None:
    """vLLM joins such outputs, and keeps the scores of the first: one that follows an output already read has none."""
    client = GatedEngineClient(engine, key=KEY, experts=(INFO,), slot_map=ONE, answers=lambda: True, clock=engine.clock)
    params = SamplingParams(n=2, prompt_logprobs=1, output_kind=RequestOutputKind.DELTA, detokenize=False)
    token = CURRENT_CALL.set(GatedCall("t", (INFO.ref,), math.inf))
    outputs = client.generate({"prompt_token_ids": [1, 2, 3]}, params, "request")
    CURRENT_CALL.reset(token)
    first = asyncio.ensure_future(anext(outputs))
    while not engine.children:
        await asyncio.sleep(0)
    one, other = engine.children
    engine.output_processor.process_outputs([scored(one, 5, prompt=2)])
    scores = (await first).prompt_logprobs
    assert isinstance(scores, PromptLogprobs)
    assert len(scores) == 3
    engine.output_processor.process_outputs([scored(one, 6), scored(other, 7, prompt=2)])
    both = await anext(outputs)
    assert [part.index for part in both.outputs] == [0, 1]
    assert both.prompt_logprobs == scores
    await outputs.aclose()


@pytest.mark.asyncio
async def test_an_answer_that_is_its_prompt_has_no_new_tokens(engine: Engine) -> None:
    client = GatedEngineClient(engine, key=KEY, experts=(INFO,), slot_map=ONE, answers=lambda: True, clock=engine.clock)
    call = GatedCall("t", (INFO.ref,), math.inf, prompt_only=True)
    token = CURRENT_CALL.set(call)
    params = SamplingParams(max_tokens=1, output_kind=RequestOutputKind.FINAL_ONLY, detokenize=False)
    outputs = client.generate({"prompt_token_ids": [1, 2, 3]}, params, "request")
    CURRENT_CALL.reset(token)
    last = asyncio.ensure_future(anext(outputs))
    while not engine.children:
        await asyncio.sleep(0)
    engine.step(5, finish=True)
    assert (await last).outputs[0].token_ids == []
    assert call.tokens() == 3
    await outputs.aclose()
