"""Test requests, some of which must fail, before the server is ready or an expert is live."""

import asyncio
import math
import uuid
from typing import Any

from flexgate.server.engine.frontend.calls import CURRENT_CALL, ExpertSlotRef, GatedCall, bitmask_of
from flexgate.server.engine.frontend.client import GatedEngineClient
from flexgate.server.engine.frontend.slot_control import SlotOperator
from flexgate.server.engine.protocol.endings import NUMBERS_OVERFLOWED
from flexgate.server.engine.protocol.names import GATE_ARG, SELF_TEST
from flexgate.server.engine.seam.engine import EngineGenerateError

TENANT = "flexgate-canary"
# With a type it is rendered: anything else waits for the thread that makes tokens of tenants' text.
PROMPT = {"type": "token", "prompt_token_ids": [0, 1, 2, 3]}


class CanaryError(RuntimeError):
    """The running engine does not gate as it should."""


class CanaryNotScheduled(RuntimeError):
    """The engine had no place for the canary, which says nothing about the expert."""


async def self_test(engine: Any, client: GatedEngineClient) -> None:
    """Test the engine: no gate, a forged gate, then a gate on each expert alone.

    Those that some layer has nothing of are tested together with all others, unless a layer has nothing of any.

    Raises:
        CanaryError: the engine served what it must refuse, refused what it must serve, or
            attributed anything to an expert outside of the gate.
    """
    await _must_refuse(engine, "a request without a gate", None)
    await _must_refuse(engine, "a forged gate", {GATE_ARG: "e30.e30"})
    everything = [expert.ref for expert in client.experts()]
    alone = [ref for ref in everything if client.slot_map.covers(1 << ref.slot)]
    for ref in alone:
        await try_experts(client, ref)
    if len(alone) < len(everything) and client.slot_map.covers(bitmask_of(everything)):
        await try_experts(client, *everything)


async def try_experts(client: GatedEngineClient, *refs: ExpertSlotRef) -> None:
    """Generate under a gate on exactly ``refs``.

    Raises:
        CanaryError: the engine refused, the numbers overflowed, or attributed anything outside of the gate.
    """
    call = GatedCall(TENANT, refs, math.inf, client_salt=str(uuid.uuid4()), priority=-1)
    token = CURRENT_CALL.set(call)
    try:
        worst = await _answer(client.generate(PROMPT, _params(), "canary"))
    except Exception as error:
        if call.failed == NUMBERS_OVERFLOWED:
            raise CanaryError(f"a request for {_names(refs)} computed NaN or infinity") from error
        raise CanaryError(f"the engine refused a request for {_names(refs)}: {error}") from error
    finally:
        CURRENT_CALL.reset(token)
    if not math.isfinite(worst):
        raise CanaryError(f"a request for {_names(refs)} was answered with NaN")
    if outside := call.used_slots() - {ref.slot for ref in refs}:
        raise CanaryError(f"a request for {_names(refs)} used slots {sorted(outside)}")


async def try_added(
    client: GatedEngineClient, slots: SlotOperator, public: ExpertSlotRef, added: ExpertSlotRef, *, seconds: float
) -> None:
    """Test an expert in a serving engine, before any tenant may use it.

    Args:
        seconds: how long it may wait for a place in the batch, and then for its answer.

    Raises:
        CanaryNotScheduled: the batch stayed full.
        CanaryError: like :func:`try_experts`, or there is no answer.
    """
    trial = asyncio.ensure_future(try_experts(client, public, added))
    try:
        await asyncio.wait({trial}, timeout=seconds)
        if not trial.done():
            async with asyncio.timeout(seconds):
                if await slots.waiting(added.slot):
                    raise CanaryNotScheduled(f"no place in the batch was free within {seconds:g} seconds")
                await asyncio.wait({trial})
        trial.result()
    except TimeoutError as error:
        raise CanaryError(f"a request for {_names((public, added))} got no answer in {seconds:g} seconds") from error
    finally:
        trial.cancel()


def _names(refs: tuple[ExpertSlotRef, ...]) -> str:
    return " and ".join(repr(ref.expert) for ref in refs)


async def _must_refuse(engine: Any, what: str, extra_args: dict[str, Any] | None) -> None:
    params = _params()
    params.extra_args = extra_args
    try:
        await _answer(engine.generate(PROMPT, params, f"{SELF_TEST}{what.replace(' ', '-')}"))
    except _RefusedError:
        return
    raise CanaryError(f"the engine answered {what}")


class _RefusedError(Exception):
    """The engine ended the request with an error."""


async def _answer(outputs: Any) -> float:
    """The least log-probability of the answer's tokens; NaN if one of them is."""
    finish_reason, lowest = None, 0.0
    try:
        async for output in outputs:
            completion = output.outputs[0]
            finish_reason = completion.finish_reason
            chances = [value.logprob for position in completion.logprobs or () for value in position.values()]
            lowest = min([lowest, *chances], key=lambda chance: (not math.isnan(chance), chance))
    except EngineGenerateError as error:
        raise _RefusedError(str(error)) from error
    if finish_reason == "error":
        raise _RefusedError("finish_reason error")
    return lowest


def _params() -> Any:
    from flexgate.server.engine.seam.engine import SamplingParams

    # Log-probabilities, so that whatever is compiled for them is compiled before /ready.
    return SamplingParams(temperature=0.0, max_tokens=2, logprobs=1, prompt_logprobs=1)
