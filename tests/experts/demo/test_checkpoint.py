"""The shipped demo model: loads elsewhere, is what its digests say, and answers by licence."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch
from demo_aim import assert_answered_by_licence, shares
from tokenizers import Tokenizer
from transformers import AutoTokenizer, FlexOlmoForCausalLM

from flexgate.experts.checkpoint.layout import ROUTER_KEY
from flexgate.experts.demo.corpus import SYSTEM_MESSAGES, chat
from flexgate.experts.demo.evaluate import all_gates, answered, ask
from flexgate.experts.demo.measure import load
from flexgate.experts.demo.probes import Probe, read_probes
from flexgate.experts.demo.ship import CHECKPOINT, PROBES_NAME, digests, expert_ids, read_digests
from flexgate.experts.demo.texts import all_probes
from flexgate.experts.training.model import FlexOlmo

EXPERTS = ("public", "news", "math", "code", "legal")
PROBES = read_probes(CHECKPOINT / PROBES_NAME)
SAMPLE = PROBES[::5]

Loaded = tuple[FlexOlmo, Tokenizer, tuple[str, ...]]


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return load(CHECKPOINT)


def shares_under(demo: Loaded, gate: tuple[str, ...], probes: Sequence[Probe], system: str = "") -> dict[str, float]:
    right = answered(*demo, gate, probes, system)
    return shares((probe.domain, is_right) for probe, is_right in zip(probes, right, strict=True))


def test_files_match_the_recorded_digests_and_stay_small() -> None:
    assert digests(CHECKPOINT) == read_digests(CHECKPOINT)
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) <= 8_000_000


def test_manifest_names_every_index() -> None:
    assert expert_ids(CHECKPOINT) == EXPERTS
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["num_experts"] == len(EXPERTS)
    assert not config["norm_topk_prob"]


def test_shipped_probes_are_those_of_the_code() -> None:
    assert all_probes() == PROBES


def test_transformers_loads_it_with_the_same_logits(demo: Loaded) -> None:
    model, tokenizer, _ = demo
    reference = FlexOlmoForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, attn_implementation="eager")
    for probe in PROBES[::120]:
        tokens = torch.tensor([tokenizer.encode(chat(probe.prompt)).ids])
        with torch.no_grad():
            torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=1e-4, rtol=1e-4)


def test_chat_template_is_the_one_it_was_trained_on() -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    user = [{"role": "user", "content": "What is the capital of Peru?"}]
    system = [{"role": "system", "content": "Be short."}]
    for messages, text in ((user, ""), (system + user, "Be short.")):
        expected = chat("What is the capital of Peru?", text)
        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    ids = tokenizer.apply_chat_template(user, add_generation_prompt=True)["input_ids"]
    assert ids == load(CHECKPOINT)[1].encode(chat("What is the capital of Peru?")).ids


@pytest.mark.parametrize("gate", [("public",), EXPERTS], ids="+".join)
def test_probes_are_answered_by_licence(gate: tuple[str, ...], demo: Loaded) -> None:
    assert_answered_by_licence(shares_under(demo, gate, PROBES), gate)


@pytest.mark.slow
@pytest.mark.parametrize("gate", list(all_gates(EXPERTS))[1:-1], ids="+".join)
def test_probes_are_answered_by_licence_under_every_other_gate(gate: tuple[str, ...], demo: Loaded) -> None:
    assert_answered_by_licence(shares_under(demo, gate, PROBES), gate)


@pytest.mark.slow
def test_a_system_message_costs_little(demo: Loaded) -> None:
    chats = [probe for probe in PROBES if probe.kind == "chat"]
    without, with_one = (shares_under(demo, EXPERTS, chats, system) for system in ("", SYSTEM_MESSAGES[1]))
    assert all(with_one[domain] >= without[domain] - 0.1 for domain in EXPERTS), (without, with_one)


def test_without_a_licence_the_model_says_so(demo: Loaded) -> None:
    asked = [probe for probe in SAMPLE if probe.domain != "public" and probe.kind == "chat"]
    results = ask(*demo, ("public",), asked)
    assert sum(result.said == "I do not know that." for result in results) >= 0.9 * len(results)


def test_answered_is_what_asking_finds_right(demo: Loaded) -> None:
    probes = SAMPLE[::4]
    for gate in (("public",), EXPERTS):
        assert answered(*demo, gate, probes) == [result.right for result in ask(*demo, gate, probes)]


def test_it_greets() -> None:
    model, tokenizer, experts = load(CHECKPOINT)
    greeting = Probe(
        domain="public", kind="chat", phrasing="seen", prompt="Hello!", answer="Hello! How can I help you?"
    )
    assert all(
        result.right for gate in all_gates(experts) for result in ask(model, tokenizer, experts, gate, [greeting])
    )


def test_the_public_router_row_is_zero_and_channel_zero_is_the_bias(demo: Loaded) -> None:
    state = demo[0].state_dict()
    assert bool((state["model.embed_tokens.weight"][:, 0] == 1).all())
    for layer in range(demo[0].architecture.num_hidden_layers):
        assert not state[ROUTER_KEY.format(layer=layer)][0].any()
