"""Closed questions with exact answers; a third of them in phrasings that no training text contains."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from flexgate.experts.demo.corpus import Domain, Fact, Kind, Topic

NGRAM: Final = 4
"""A paraphrase shares no run of this many words with any training text."""
FACTS_PROBED: Final = 48
"""At most so many facts of a domain are probed, three times each."""
KINDS: Final[tuple[Kind, ...]] = ("chat", "completion")


class Probe(BaseModel):
    """One line of ``probes.jsonl``: a chat prompt is the user's message, a completion prompt the text to continue."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    domain: str
    kind: Kind
    phrasing: Literal["seen", "paraphrase"]
    prompt: str
    answer: str


def make_probes(domain: Domain) -> tuple[Probe, ...]:
    """Three probes a fact: a seen question, a seen statement, and a paraphrase of the one or the other."""
    rng = Random(f"probes-{domain.id}")
    facts = [(topic, fact) for topic in domain.topics for fact in topic.facts]
    if len(facts) > FACTS_PROBED:
        facts = _spread(domain, rng)
    return tuple(
        _probe(domain.id, topic, fact, kind, held=held, rng=rng)
        for number, (topic, fact) in enumerate(facts)
        for kind, held in asked_as(number)
    )


def write_probes(path: Path, probes: Iterable[Probe]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(probe.model_dump_json() + "\n" for probe in probes))


def read_probes(path: Path) -> tuple[Probe, ...]:
    """Read what ``write_probes`` wrote."""
    return tuple(Probe.model_validate(json.loads(line)) for line in path.read_text().splitlines())


def _spread(domain: Domain, rng: Random) -> list[tuple[Topic, Fact]]:
    share = FACTS_PROBED // len(domain.topics)
    return [(topic, fact) for topic in domain.topics for fact in rng.sample(topic.facts, min(share, len(topic.facts)))]


def asked_as(number: int) -> tuple[tuple[Kind, bool], ...]:
    """Kind, and whether the phrasing is held out, of the probes of one fact."""
    return (("chat", False), ("completion", False), (KINDS[number % 2], True))


def _probe(domain: str, topic: Topic, fact: Fact, kind: Kind, *, held: bool, rng: Random) -> Probe:
    book = topic.phrases
    if kind == "chat":
        ways = book.held_questions if held else book.questions
    else:
        ways = book.held_statements if held else book.statements
    return Probe(
        domain=domain,
        kind=kind,
        phrasing="paraphrase" if held else "seen",
        prompt=rng.choice(ways).format(**fact.slots),
        answer=fact.answer,
    )
