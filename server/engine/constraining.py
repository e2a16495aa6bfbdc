"""What constrains an engine request, brought into the form that is enforced before vLLM has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.exceptions import VLLMValidationError

from flexgate.server.constraints.errors import ConstraintError
from flexgate.server.constraints.made import enforced

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


def constrain(params: SamplingParams) -> None:
    """Write the constraint of ``params`` as it is enforced, if there is one.

    Raises:
        VLLMValidationError: it is not enforced, or not together with the other parameters.
    """
    if params.structured_outputs is None:
        return
    _refuse_no_end(params)
    try:
        params.structured_outputs = enforced(params.structured_outputs)
    except ConstraintError as error:
        raise VLLMValidationError(f"The answer cannot be constrained as asked: {error}.") from error


def _refuse_no_end(params: SamplingParams) -> None:
    """Refuse what goes on behind the end of a constraint, where nothing is allowed: vLLM allows everything there."""
    for name in ("ignore_eos", "min_tokens"):
        if getattr(params, name):
            message = f"'{name}' cannot be used beside a constraint, which says where the answer ends."
            raise VLLMValidationError(message, parameter=name)
