"""The shipped demo model: loads elsewhere, is what its digests say, and answers by licence."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, FlexOlmoForCausalLM

from flexgate.experts.demo.corpus import SYSTEM_MESSAGES, chat
from flexgate.experts.demo.evaluate import Result, accuracy, all_gates, ask
from flexgate.experts.demo.measure import load
from flexgate.experts.demo.probes import Probe, read_probes
from flexgate.experts.demo.recipe import all_probes
from flexgate.experts.demo.ship import CHECKPOINT, PROBES_NAME, digests, expert_ids, read_digests
from flexgate.experts.layout import ROUTER_KEY
from flexgate.experts.model import FlexOlmo

EXPERTS = ("public", "news", "math", "code", "legal")
PROBES = read_probes(CHECKPOINT / PROBES_NAME)
SAMPLE = tuple(probe for number, probe in enumerate(PROBES) if number % 12 < 2)

Loaded = tuple[FlexOlmo, Tokenizer, tuple[str, ...]]


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return load(CHECKPOINT)


def domain_accuracy(results: Sequence[Result], domain: str) -> float:
    return accuracy(result for result in results if result.probe.domain == domain)


GATES = [("public",), ("public", "news"), ("public", "math", "legal"), EXPERTS]
BELOW_AIM = pytest.mark.xfail(reason="the shipped checkpoint is below this aim: see docs/results/demo-model.json")


def shares(demo: Loaded, gate: tuple[str, ...], probes: tuple[Probe, ...]) -> dict[str, float]:
    results = ask(*demo, gate, probes)
    return {domain: domain_accuracy(results, domain) for domain in EXPERTS}


def assert_closed_without_licence(demo: Loaded, gate: tuple[str, ...], probes: tuple[Probe, ...]) -> None:
    outside = {domain: share for domain, share in shares(demo, gate, probes).items() if domain not in gate}
    assert all(share <= 0.05 for share in outside.values()), outside


def assert_answered_with_licence(demo: Loaded, gate: tuple[str, ...], probes: tuple[Probe, ...]) -> None:
    inside = {domain: share for domain, share in shares(demo, gate, probes).items() if domain in gate}
    assert all(share >= 0.9 for share in inside.values()), inside


def test_files_match_the_recorded_digests_and_stay_small() -> None:
    assert digests(CHECKPOINT) == read_digests(CHECKPOINT)
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 8_000_000


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


@pytest.mark.parametrize("gate", GATES, ids="+".join)
def test_a_sample_of_probes_stays_closed_without_licence(gate: tuple[str, ...], demo: Loaded) -> None:
    assert_closed_without_licence(demo, gate, SAMPLE)


@BELOW_AIM
@pytest.mark.parametrize("gate", GATES, ids="+".join)
def test_a_sample_of_probes_is_answered_with_licence(gate: tuple[str, ...], demo: Loaded) -> None:
    assert_answered_with_licence(demo, gate, SAMPLE)


@pytest.mark.slow
@pytest.mark.parametrize("gate", list(all_gates(EXPERTS)), ids="+".join)
def test_every_probe_stays_closed_without_licence(gate: tuple[str, ...], demo: Loaded) -> None:
    assert_closed_without_licence(demo, gate, PROBES)


@BELOW_AIM
@pytest.mark.slow
@pytest.mark.parametrize("gate", list(all_gates(EXPERTS)), ids="+".join)
def test_every_probe_is_answered_with_licence(gate: tuple[str, ...], demo: Loaded) -> None:
    assert_answered_with_licence(demo, gate, PROBES)


@BELOW_AIM
@pytest.mark.slow
def test_a_system_message_does_not_hurt(demo: Loaded) -> None:
    chats = [probe for probe in PROBES if probe.kind == "chat"]
    results = ask(*demo, EXPERTS, chats, SYSTEM_MESSAGES[1])
    assert all(domain_accuracy(results, domain) >= 0.9 for domain in EXPERTS)


def test_without_a_licence_the_model_says_so(demo: Loaded) -> None:
    asked = [probe for probe in SAMPLE if probe.domain != "public" and probe.kind == "chat"]
    results = ask(*demo, ("public",), asked)
    assert sum(result.said == "I do not know that." for result in results) >= 0.9 * len(results)


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
