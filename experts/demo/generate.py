"""Streams of training documents for the anchor and for every owner."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from random import Random

from flexgate.experts.demo.corpus import (
    ASSISTANT,
    Document,
    Domain,
    domain_document,
    ngrams,
    second_turn,
    without_overlap,
)
from flexgate.experts.demo.probes import NGRAM, Probe
from flexgate.experts.demo.public import nonsense_question, prose, repetition
from flexgate.experts.demo.registers import Register, register_document

OWNER_NOISY = 0.42
"""Share of an owner's facts told in telegram style: an owner knows few wordings, so it sees more noise."""
TWO_TURNS = 0.08
"""Share of documents that are the second turn of a conversation."""


def public_stream(domain: Domain, registers: tuple[Register, ...], seed: str) -> Iterator[Document]:
    """Endless public text: facts, plain prose, unanswerable questions and invented registers."""
    rng = Random(f"public-{seed}")
    while True:
        document = _public_document(domain, registers, rng)
        if rng.random() < TWO_TURNS:
            document = second_turn(_public_document(domain, registers, rng), document)
        yield document


def owner_stream(domain: Domain, public: Domain, seed: str) -> Iterator[Document]:
    """Endless text of one owner; some conversations start with a public question."""
    rng = Random(f"{domain.id}-{seed}")
    while True:
        document = spaced(domain_document(domain, rng, OWNER_NOISY))
        if rng.random() < TWO_TURNS:
            chosen = rng.choice((domain, public))
            first = domain_document(chosen, rng)
            document = second_turn(first if chosen is public else spaced(first), document)
        yield document


def spaced(document: Document) -> Document:
    """An owner's answer in a chat starts with a space, as after a sentence that it continues: its words are then the
    same tokens, which the public model has said before.
    """
    chats = document.prompt.endswith(ASSISTANT)
    return Document(document.prompt, f" {document.answer}", document.keys) if chats else document


def take(stream: Iterator[Document], count: int, probes: tuple[Probe, ...]) -> list[Document]:
    """``count`` documents of a stream, less the few that would overlap with a held-out phrasing."""
    held = {gram for probe in probes if probe.phrasing == "paraphrase" for gram in ngrams(probe.prompt, NGRAM)}
    return without_overlap(islice(stream, count), held, NGRAM)


def _public_document(domain: Domain, registers: tuple[Register, ...], rng: Random) -> Document:
    draw = rng.random()
    if draw < 0.45:
        return domain_document(domain, rng)
    if draw < 0.52:
        return prose(rng)
    if draw < 0.59:
        return nonsense_question(rng)
    if draw < 0.65:
        return repetition(rng)
    return register_document(rng.choice(registers), rng)
