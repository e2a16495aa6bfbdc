"""What constrains a request is held to its end, tried elsewhere and sealed, or refused."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.exceptions import QueueOverflowError, VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from flexgate.server.engine.frontend.constraining import Constrainer
from flexgate.server.engine.frontend.constraints.compiler import CompilerBusy
from flexgate.server.engine.frontend.constraints.errors import ConstraintError
from flexgate.server.engine.frontend.constraints.made import Constraint
from flexgate.server.engine.protocol.constraints import open_constraint
from flexgate.server.engine.protocol.gates import new_seal_key

KEY = new_seal_key()


class Compiler:
    """Raises what a test says, and notes what it was given."""

    error: Exception | None = None

    def __init__(self) -> None:
        self.tried: list[tuple[str, Constraint]] = []

    async def check(self, tenant: str, constraint: Constraint) -> None:
        self.tried.append((tenant, constraint))
        if self.error is not None:
            raise self.error


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(structured_outputs=StructuredOutputsParams(json={"type": "integer"}), **fields)


def constrainer(compiler: Any) -> Constrainer:
    return Constrainer(compiler, KEY)


@pytest.mark.asyncio
async def test_a_constraint_reaches_the_engine_core_as_it_was_tried() -> None:
    compiler, constrained = Compiler(), params()
    await constrainer(compiler).constrain("t", constrained)
    ((tenant, constraint),) = compiler.tried
    assert tenant == "t"
    assert constrained.structured_outputs is not None
    assert open_constraint(constrained.structured_outputs.grammar, KEY)[1:] == (constraint.kind, constraint.text)


@pytest.mark.asyncio
@pytest.mark.parametrize("endless", [{"ignore_eos": True}, {"min_tokens": 3}, {"allowed_token_ids": [7]}])
async def test_what_a_constraint_says_no_other_parameter_says(endless: dict[str, Any]) -> None:
    with pytest.raises(VLLMValidationError) as refused:
        await constrainer(Compiler()).constrain("t", params(**endless))
    assert refused.value.parameter in endless
    await constrainer(Compiler()).constrain("t", SamplingParams(**endless))


@pytest.mark.asyncio
async def test_what_cannot_be_constrained_is_refused_with_its_reason() -> None:
    compiler = Compiler()
    with pytest.raises(VLLMValidationError, match="the keyword 'not' is not supported"):
        await constrainer(compiler).constrain(
            "t", SamplingParams(structured_outputs=StructuredOutputsParams(json={"not": {}}))
        )
    assert not compiler.tried
    compiler.error = ConstraintError("it takes too long")
    with pytest.raises(VLLMValidationError, match="it takes too long"):
        await constrainer(compiler).constrain("t", params())
    compiler.error = CompilerBusy("wait")
    with pytest.raises(QueueOverflowError):
        await constrainer(compiler).constrain("t", params())
    with pytest.raises(VLLMValidationError, match="no tokenizer"):
        await constrainer(None).constrain("t", params())
