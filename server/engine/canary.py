"""Requests that must fail, and one that must not, before the server says it is ready."""

import math
from typing import Any

from flexgate.server.engine.client import (
    CURRENT_CALL,
    ExpertLease,
    GatedCall,
    GatedEngineClient,
    GateGrant,
)
from flexgate.server.engine.gates import GATE_ARG

TENANT = "flexgate-canary"
PROMPT = {"prompt_token_ids": [0, 1, 2, 3]}


class CanaryError(RuntimeError):
    """The running engine does not gate as it should."""


async def sing(engine: Any, client: GatedEngineClient) -> None:
    """Try the engine from inside: no gate, a forged gate, then a gate on the public expert.

    Raises:
        CanaryError: the engine answered what it must refuse, refused what it must answer, or
            attributed anything to an expert outside of the gate.
    """
    await _must_refuse(engine, "a request without a gate", None)
    await _must_refuse(engine, "a forged gate", {GATE_ARG: "e30.e30"})
    public = client.experts()[0]
    grant = GateGrant(TENANT, (ExpertLease(public.id, public.slot, public.generation),), math.inf)
    call = GatedCall(grant)
    token = CURRENT_CALL.set(call)
    try:
        await _answer(client.generate(PROMPT, _params(), "canary"))
    except Exception as error:
        raise CanaryError(f"the engine refused a request for the public expert: {error}") from error
    finally:
        CURRENT_CALL.reset(token)
    used = {use.expert for use in call.attribution().experts if use.tokens or use.gate_mass}
    if used != {public.id}:
        raise CanaryError(f"a request for the public expert alone used {sorted(used)}")


async def _must_refuse(engine: Any, what: str, extra_args: dict[str, Any] | None) -> None:
    params = _params()
    params.extra_args = extra_args
    try:
        await _answer(engine.generate(PROMPT, params, f"{TENANT}-{what.replace(' ', '-')}"))
    except _RefusedError:
        return
    raise CanaryError(f"the engine answered {what}")


class _RefusedError(Exception):
    """The engine ended the request with an error."""


async def _answer(outputs: Any) -> None:
    from vllm.v1.engine.exceptions import EngineGenerateError

    finish_reason = None
    try:
        async for output in outputs:
            finish_reason = output.outputs[0].finish_reason
    except EngineGenerateError as error:
        raise _RefusedError(str(error)) from error
    if finish_reason == "error":
        raise _RefusedError("finish_reason error")


def _params() -> Any:
    from vllm.sampling_params import SamplingParams

    # Log-probabilities, so that whatever is compiled for them is compiled before /ready.
    return SamplingParams(temperature=0.0, max_tokens=2, logprobs=1, prompt_logprobs=1)
