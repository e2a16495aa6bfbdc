"""What constrains an engine request: checked, tried in a process of its own, and sealed for the engine core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from flexgate.server.engine.frontend.constraints.compiler import Compiler, CompilerBusy
from flexgate.server.engine.frontend.constraints.errors import ConstraintError
from flexgate.server.engine.frontend.constraints.made import Constraint
from flexgate.server.engine.protocol.constraints import seal_constraint
from flexgate.server.engine.protocol.gates import SealKey
from flexgate.server.engine.seam.engine import QueueOverflowError, VLLMValidationError

if TYPE_CHECKING:
    from flexgate.server.engine.seam.engine import SamplingParams


class Constrainer:
    """Brings the constraints of requests into the form in which the engine core takes them."""

    def __init__(self, compiler: Compiler | None, key: SealKey) -> None:
        """Without ``compiler``, which needs a tokenizer, no answer can be constrained."""
        self._compiler = compiler
        self._key = key

    async def constrain(self, tenant: str, params: SamplingParams) -> Constraint | None:
        """Replace the constraint of ``params``, if there is one, by a sealed one that was tried; returns the latter.

        Raises:
            VLLMValidationError: it is not enforced, not together with the other parameters, or not within the limits.
            QueueOverflowError: it could not be compiled now.
        """
        made = params.structured_outputs
        if made is None or made.all_constraints_none():
            return None
        _refuse_beside(params)
        if self._compiler is None:
            raise VLLMValidationError("This server has no tokenizer to constrain answers with.")
        try:
            constraint = Constraint.made(made)
            await self._compiler.check(tenant, constraint)
        except ConstraintError as error:
            raise VLLMValidationError(f"The answer cannot be constrained as asked: {error}.") from error
        except CompilerBusy as error:
            raise QueueOverflowError from error
        sealed = seal_constraint(tenant, constraint.kind, constraint.text, self._key)
        params.structured_outputs = type(made)(grammar=sealed)
        return constraint

    def avoid(self, tenant: str, constraint: Constraint) -> None:
        """Refuse a constraint of a tenant for a while: it was slow to follow."""
        if self._compiler is not None:
            self._compiler.avoid(tenant, constraint)


_BESIDE: Final = {
    "ignore_eos": "which determines where the answer ends",
    "min_tokens": "which determines where the answer ends",
    "allowed_token_ids": "which determines what the answer is made of",
}
"""Parameters that go on behind a constraint's end, where vLLM allows everything, or leave nothing that it allows."""


def _refuse_beside(params: SamplingParams) -> None:
    for name, why in _BESIDE.items():
        if getattr(params, name):
            raise VLLMValidationError(f"'{name}' cannot be combined with a constraint, {why}.", parameter=name)
