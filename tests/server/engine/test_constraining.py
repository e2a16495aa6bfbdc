"""What constrains a request is held to its end, or refused."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from flexgate.server.engine.constraining import constrain


@pytest.mark.parametrize("endless", [{"ignore_eos": True}, {"min_tokens": 3}])
def test_no_answer_goes_on_behind_the_end_of_its_constraint(endless: dict[str, Any]) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["a"]), **endless)
    with pytest.raises(VLLMValidationError) as refused:
        constrain(params)
    assert refused.value.parameter in endless
    constrain(SamplingParams(**endless))


def test_a_schema_that_is_not_enforced_is_named() -> None:
    with pytest.raises(VLLMValidationError, match="'not' is not enforced"):
        constrain(SamplingParams(structured_outputs=StructuredOutputsParams(json={"not": {}})))
