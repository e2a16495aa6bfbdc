"""Where requests pass between the API process, the engine core and the ranks of vLLM 0.32.0.

``Request.from_engine_core_request`` (vllm/v1/request.py)
    The one place where every request, whichever client it came from, becomes the
    engine core's own object: before its blocks are hashed for the prefix cache and
    before it is queued. An exception there ends this request alone.
``NewRequestData.req_id`` (vllm/v1/engine/input_processor.py, parallel_sampling.py)
    What workers know a request by: the id it was submitted under and a random suffix, and for one
    of several choices its index before them.
``AsyncLLM.output_processor.add_request / process_outputs`` (vllm/v1/engine/output_processor.py)
    Where a request that passed all checks goes to the engine core; where outputs of the engine core
    reach the API process, one per request and step.
``EngineCoreOutput.kv_transfer_params`` (vllm/v1/engine/__init__.py)
    A free-form dictionary that rides on each output; flexgate refuses KV connectors, whose it is.
"""

from collections.abc import Callable
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.request import Request

RequestGuard = Callable[[EngineCoreRequest], Any]


def external_id(request_id: str) -> str:
    """The id that a request was submitted under, from the one that workers know it by."""
    given, _, _random = request_id.rpartition("-")
    index, _, rest = given.partition("_")
    return rest if rest and index.isdecimal() else given


def guard_requests(guard: RequestGuard) -> None:
    """Run ``guard`` on every request before the engine core makes it its own.

    ``guard`` may change the request and raises to refuse it; its return value is kept
    as ``flexgate_gate`` on the resulting :class:`Request`. A second call replaces the
    first guard.
    """
    create = Request.__dict__["from_engine_core_request"].__func__
    create = getattr(create, "flexgate_unguarded", create)

    def from_engine_core_request(cls: type[Request], request: EngineCoreRequest, block_hasher: Any) -> Request:
        gate = guard(request)
        created = create(cls, request, block_hasher)
        created.flexgate_gate = gate
        return created

    from_engine_core_request.flexgate_unguarded = create  # type: ignore[attr-defined]
    Request.from_engine_core_request = classmethod(from_engine_core_request)


def see_requests(engine: Any, see: Callable[[str, int], None]) -> None:
    """Tell ``see`` of every request that goes to the engine core.

    Args:
        engine: an ``AsyncLLM`` or ``LLMEngine``.
        see: gets the id that the request was submitted under, and how many tokens its prompt has; each
            of several choices is a request of its own with the same id.
    """
    processor = engine.output_processor
    add = processor.add_request

    def add_request(request: EngineCoreRequest, *args: Any, **kwargs: Any) -> None:
        add(request, *args, **kwargs)
        see(request.external_req_id, len(request.prompt_token_ids or ()))

    processor.add_request = add_request


def take_output_extras(engine: Any, take: Callable[[EngineCoreOutput, str | None], None]) -> None:
    """Show ``take`` every engine-core output, with its external request id, before vLLM sees it.

    Args:
        engine: an ``AsyncLLM`` or ``LLMEngine``.
        take: gets the output and the id that the request was submitted under, or None
            for a request that has ended.
    """
    processor = engine.output_processor
    process = processor.process_outputs

    def process_outputs(outputs: list[EngineCoreOutput], *args: Any, **kwargs: Any) -> Any:
        for output in outputs:
            state = processor.request_states.get(output.request_id)
            take(output, state.external_req_id if state is not None else None)
        return process(outputs, *args, **kwargs)

    processor.process_outputs = process_outputs
