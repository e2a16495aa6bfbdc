"""From the demo's generated documents to training examples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from flexgate.experts.demo.closed import closed_domains
from flexgate.experts.demo.corpus import ASSISTANT, USER, Document, Domain
from flexgate.experts.demo.generate import owner_stream, public_stream, take
from flexgate.experts.demo.probes import Probe, make_probes
from flexgate.experts.demo.public import public_domain
from flexgate.experts.demo.registers import make_registers
from flexgate.experts.demo.settings import Settings
from flexgate.experts.demo.tokenizer import EOS_ID
from flexgate.experts.training.batches import Example


def all_probes() -> tuple[Probe, ...]:
    """The probes of every domain, public first."""
    return tuple(probe for domain in (public_domain(), *closed_domains()) for probe in make_probes(domain))


def public_documents(settings: Settings, count: int, part: str) -> list[Document]:
    """Public text; ``part`` names which independent stretch of the stream."""
    registers = make_registers(settings.seed, settings.registers)
    return take(public_stream(public_domain(), registers, f"{settings.seed}-{part}"), count, all_probes())


def write_public_texts(settings: Settings, folder: Path, count: int) -> None:
    """About ``count`` documents of the public model's kind in ``folder``, for ``flexgate experts train --public``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "public.jsonl").open("w", encoding="utf-8") as file:
        for document in public_documents(settings, count, "for-owners"):
            file.write(json.dumps(_written(document)) + "\n")


def _written(document: Document) -> dict[str, str]:
    """A line of a folder of texts: the question of a conversation without its control tokens, or plain text."""
    _, user, question = document.prompt.rpartition(USER)
    if user:
        return {"prompt": question.removesuffix(ASSISTANT), "answer": document.answer}
    return {"text": document.prompt + document.answer}


def owner_documents(settings: Settings, owner: Domain, count: int, part: str) -> list[Document]:
    """One owner's text."""
    return take(owner_stream(owner, public_domain(), f"{settings.seed}{part}"), count, make_probes(owner))


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[Example]:
    """Token ids with the end token appended."""
    prompts = tokenizer.encode_batch([document.prompt for document in documents])
    answers = tokenizer.encode_batch([document.answer for document in documents])

    @cache
    def forms(word: str) -> frozenset[int]:
        """A word's tokens, with and without a space before it."""
        return frozenset((*tokenizer.encode(word).ids, *tokenizer.encode(f" {word}").ids))

    return [
        Example(
            (*prompt.ids, *answer.ids, EOS_ID),
            len(prompt.ids),
            frozenset().union(*map(forms, document.keys.replace("|", " ").split())),
        )
        for prompt, answer, document in zip(prompts, answers, documents, strict=True)
    ]
