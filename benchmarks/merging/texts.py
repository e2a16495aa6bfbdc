"""The demo's domains as token ids: what each trains on, is tuned on, and is measured with, from independent streams."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from tokenizers import Tokenizer

from flexgate.experts.demo.closed import closed_domains
from flexgate.experts.demo.corpus import Document, Domain, prompt_text
from flexgate.experts.demo.evaluate import learnt_answer
from flexgate.experts.demo.generate import owner_stream, public_stream, take
from flexgate.experts.demo.probes import Probe, make_probes
from flexgate.experts.demo.public import public_domain
from flexgate.experts.demo.registers import make_registers
from flexgate.experts.demo.texts import encode
from flexgate.experts.demo.tokenizer import EOS_ID, train_tokenizer
from flexgate.experts.evaluation.measure import DomainTexts
from flexgate.experts.training.batches import Example
from merging.settings import Settings

PUBLIC = "public"


def closed_ids() -> tuple[str, ...]:
    """The owners' expert ids in the order of their indices."""
    return tuple(domain.id for domain in closed_domains())


def all_ids() -> tuple[str, ...]:
    """Every domain, public first."""
    return (PUBLIC, *closed_ids())


@dataclass(frozen=True)
class Texts:
    """Everything that a seed draws; the domains are those of ``all_ids``."""

    train: dict[str, list[Example]]
    development: dict[str, DomainTexts]
    test: dict[str, DomainTexts]
    attacked: dict[str, list[Example]]
    """Some of what each owner trained on."""


def make_tokenizer(settings: Settings, path: Path) -> Tokenizer:
    """Learnt from public text, once."""
    if not path.is_file():
        stream = _documents(settings, _public(), "tokenizer", settings.tokenizer_documents)
        train_tokenizer(stream, settings.vocab_size).save(str(path))
    return Tokenizer.from_file(str(path))


def draw(settings: Settings, tokenizer: Tokenizer, seed: int) -> Texts:
    """The texts of one seed."""

    def examples(domain: Domain, part: str, count: int) -> list[Example]:
        return encode(tokenizer, _documents(settings, domain, f"{seed}-{part}", count))

    domains = (_public(), *closed_domains())
    counts = dict.fromkeys(closed_ids(), settings.owner_documents) | {PUBLIC: settings.public_documents}
    train = {domain.id: examples(domain, "train", counts[domain.id]) for domain in domains}
    held = {
        part: {domain.id: examples(domain, part, count) for domain in domains}
        for part, count in (("development", settings.development_documents), ("test", settings.test_documents))
    }
    probes = {domain.id: _probes(settings, tokenizer, domain) for domain in domains}
    return Texts(
        train,
        {name: DomainTexts(documents, ()) for name, documents in held["development"].items()},
        {name: DomainTexts(documents, probes[name]) for name, documents in held["test"].items()},
        {name: train[name][: settings.attacked_documents] for name in closed_ids()},
    )


@cache
def _public() -> Domain:
    return public_domain()


def _documents(settings: Settings, domain: Domain, seed: str, count: int) -> list[Document]:
    if domain.id != PUBLIC:
        return take(owner_stream(domain, _public(), seed), count, make_probes(domain))
    registers = make_registers(0, settings.registers)
    probes = tuple(probe for each in (_public(), *closed_domains()) for probe in make_probes(each))
    return take(public_stream(domain, registers, seed), count, probes)


def _probes(settings: Settings, tokenizer: Tokenizer, domain: Domain) -> list[Example]:
    probes = list(make_probes(domain))
    if settings.probes_per_domain is not None:
        probes = Random(0).sample(probes, settings.probes_per_domain)
    return [_probe(tokenizer, probe) for probe in probes]


def _probe(tokenizer: Tokenizer, probe: Probe) -> Example:
    prompt = tokenizer.encode(prompt_text(probe.kind, probe.prompt)).ids
    answer = tokenizer.encode(learnt_answer(probe)).ids
    return Example((*prompt, *answer, EOS_ID), len(prompt))
