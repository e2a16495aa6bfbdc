"""From a folder of invented facts to a merged model by the documented commands: answered with the expert only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from walkkit import OWN, PHRASES, PUBLIC, make_model

from flexgate.experts.checkpoint.reader import read_checkpoint, read_json
from flexgate.experts.training.decode import greedy
from flexgate.experts.training.encoding import Encoder
from flexgate.experts.training.model import FlexOlmo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merged checkpoint."""
    return make_model(tmp_path_factory.mktemp("walk"))


def answers(model: Path, questions: list[str], gate: list[bool]) -> list[str]:
    """Greedy answers of the reference model under a gate."""
    encoder = Encoder.from_model(model, read_json(model / "config.json"))
    merged, allowed_E = FlexOlmo.from_tensors(*read_checkpoint(model)), torch.tensor(gate)
    turns = [[{"role": "user", "content": question}] for question in questions]
    prompts = [
        encoder.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False) for turn in turns
    ]
    said = greedy(
        lambda tokens_BT: merged(tokens_BT, allowed_E.expand(len(tokens_BT), -1)),
        prompts,
        eos_id=encoder.eos_id,
        max_new=12,
    )
    return [encoder.tokenizer.decode(tokens).strip() for tokens in said]


def right(model: Path, questions: dict[str, str], gate: list[bool]) -> int:
    """How many are answered exactly."""
    return sum(map(str.__eq__, answers(model, list(questions), gate), questions.values()))


def test_closed_facts_are_answered_with_the_expert_only_and_public_ones_always(model: Path) -> None:
    own = {PHRASES[0].format(planet): f"It is {colour}." for planet, colour in OWN.items()}
    public = {PHRASES[1].format(f"the {thing}"): f"It is {colour}." for thing, colour in PUBLIC.items()}
    assert right(model, own, [True, True]) >= 5
    assert right(model, own, [True, False]) <= 1
    assert right(model, public, [True, True]) >= 5
    assert right(model, public, [True, False]) >= 5
