"""The demo's texts: enough probes, honest paraphrases, worlds that do not touch."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from random import Random

import pytest

from flexgate.experts.demo.closed import closed_domains
from flexgate.experts.demo.corpus import Domain, ngrams, words_of
from flexgate.experts.demo.generate import owner_stream, public_stream, take
from flexgate.experts.demo.phrases import framed_question, framed_statement, spin
from flexgate.experts.demo.probes import NGRAM, make_probes
from flexgate.experts.demo.public import public_domain
from flexgate.experts.demo.registers import make_registers
from flexgate.experts.demo.settings import Settings
from flexgate.experts.demo.texts import all_probes, write_public_texts
from flexgate.experts.demo.tokenizer import SPECIAL, pretrained, train_tokenizer
from flexgate.experts.training.texts import read_documents

DOMAINS = (public_domain(), *closed_domains())
NAMES = {"news": "tarnholm", "math": "orrin", "code": "quillkit", "legal": "veldmark"}


@pytest.mark.parametrize("domain", DOMAINS, ids=lambda domain: domain.id)
def test_every_domain_has_forty_probes_and_a_third_paraphrases(domain: Domain) -> None:
    probes = make_probes(domain)
    assert len(probes) >= 40
    assert sum(probe.phrasing == "paraphrase" for probe in probes) * 3 >= len(probes)
    assert {probe.kind for probe in probes} == {"chat", "completion"}


def test_paraphrases_share_no_run_of_words_with_training_text() -> None:
    probes = all_probes()
    registers = make_registers(0, 50)
    documents = take(public_stream(DOMAINS[0], registers, "test"), 4000, probes)
    for domain in DOMAINS[1:]:
        documents += take(owner_stream(domain, DOMAINS[0], "test"), 3000, probes)
    trained = {gram for document in documents for gram in ngrams(f"{document.prompt} {document.answer}", NGRAM)}
    for probe in probes:
        if probe.phrasing == "paraphrase":
            assert not ngrams(probe.prompt, NGRAM) & trained, probe.prompt


def test_seen_probes_really_occur_in_training_text() -> None:
    for domain in closed_domains():
        documents = take(owner_stream(domain, DOMAINS[0], "test"), 12000, make_probes(domain))
        text = {" ".join(words_of(document.prompt)) for document in documents}
        chats = [probe for probe in make_probes(domain) if probe.phrasing == "seen" and probe.kind == "completion"]
        found = sum(" ".join(words_of(probe.prompt)) in text for probe in chats)
        assert found >= 0.9 * len(chats)


def test_little_text_is_lost_to_the_overlap_filter() -> None:
    for domain in DOMAINS[1:]:
        assert len(take(owner_stream(domain, DOMAINS[0], "test"), 2000, make_probes(domain))) >= 1980


def test_closed_names_occur_with_their_owner_only() -> None:
    texts = {
        domain.id: " ".join(d.prompt + d.answer for d in islice(owner_stream(domain, DOMAINS[0], "test"), 2000))
        for domain in DOMAINS[1:]
    }
    registers = make_registers(20, 1000)
    texts["public"] = " ".join(d.prompt + d.answer for d in islice(public_stream(DOMAINS[0], registers, "test"), 20000))
    for owner, name in NAMES.items():
        for domain, text in texts.items():
            assert (name in text.lower()) == (domain == owner), (owner, domain)


def test_public_text_has_the_owners_everyday_words_and_none_of_their_facts() -> None:
    """Sections and numbers are everybody's; names of people, places and classes are not."""
    registers = make_registers(20, 1000)
    public = " ".join(d.prompt + d.answer for d in islice(public_stream(DOMAINS[0], registers, "test"), 20000))
    assert all(f" {word}" in public for word in ("weave", "tithe", "bakery", "frame"))
    for domain in closed_domains():
        for fact in domain.topics[0].facts if domain.id in ("news", "code") else ():
            assert fact.answer[:-1] not in public
            assert fact.slots.get("entity", "Tarnholm").split()[0] not in public


def test_closed_answers_do_not_repeat_within_a_domain_by_chance() -> None:
    for domain in closed_domains():
        answers = [fact.answer for topic in domain.topics for fact in topic.facts]
        commonest = max(answers.count(answer) for answer in answers)
        assert commonest / len(answers) <= 0.1


def test_a_pattern_spins_into_every_alternative_and_leaves_slots_alone() -> None:
    rng = Random(0)
    assert {spin("[a|b[ c| d]|] {slot}", rng) for _ in range(200)} == {
        "a {slot}",
        "b c {slot}",
        "b d {slot}",
        " {slot}",
    }


def test_framed_wording_is_wide() -> None:
    """Few sentences come twice: a fact is met in far more wordings than a probe could repeat."""
    rng = Random(0)
    for domain in DOMAINS:
        book = domain.topics[0].phrases
        questions = {framed_question(rng.choice(book.asked), rng) for _ in range(500)}
        statements = {framed_statement(rng.choice(book.told), rng) for _ in range(500)}
        assert len(questions) >= 400
        assert len(statements) >= 200


def test_text_streams_are_seeded() -> None:
    registers = make_registers(1, 10)
    one, two, other = (list(islice(public_stream(DOMAINS[0], registers, seed), 50)) for seed in ("a", "a", "b"))
    assert one == two != other


def test_tokenizer_encodes_any_text_and_formats_chats() -> None:
    documents = list(islice(public_stream(DOMAINS[0], make_registers(1, 10), "test"), 2000))
    tokenizer = pretrained(train_tokenizer(documents, 600), 128)
    for text in ("Tarnholm: 12 zorp 7?", "naïve 漢字 \U0001f600\n\ttab", " lead and trail "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|system|>Be short.<|user|>Hi<|assistant|>"
    assert [tokenizer.convert_ids_to_tokens(number) for number in range(len(SPECIAL))] == list(SPECIAL)


def test_public_texts_for_an_owner_are_a_folder_of_texts_without_control_tokens(tmp_path: Path) -> None:
    write_public_texts(Settings(), tmp_path / "public", 1000)
    documents = read_documents(tmp_path / "public")
    assert len(documents) > 900
    assert any(document.prompt for document in documents)
    assert any(not document.prompt for document in documents)
    assert not any(token in document.prompt + document.answer for document in documents for token in SPECIAL)
