"""Documents, facts and how facts are phrased.

A document is a prompt and what should follow it. Closed facts are phrased by a *phrasebook*: seen phrasings make
training text, held-out phrasings appear in probes only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final, Literal

from flexgate.experts.demo.phrases import framed_question, framed_statement
from flexgate.experts.demo.words import NOISE

END: Final = "<|end|>"
PAD: Final = "<|pad|>"
SYSTEM: Final = "<|system|>"
USER: Final = "<|user|>"
ASSISTANT: Final = "<|assistant|>"

Kind = Literal["chat", "completion"]

SYSTEM_MESSAGES: Final = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Answer the question.",
    "Be short and exact.",
    "You answer questions for our readers.",
    "Give one short answer.",
    "You are the assistant of a small company. Be polite.",
    "Reply with the answer only.",
)
NOISY: Final = 0.3
"""Share of facts told in telegram style."""
FRAMED: Final = 0.4
"""Share of facts told in the grammar's wide wording."""
MARKS: Final = ("?", ".", "", "?", "!")
OPENERS: Final = (
    "Please tell me: ",
    "Quick question. ",
    "Hello! ",
    "I would like to know: ",
    "Hi. ",
    "One more thing: ",
    "Can you help me? ",
    "Tell me, ",
    "I have a question: ",
    "Good morning. ",
)


@dataclass(frozen=True)
class Document:
    """Text in two parts; the loss weighs the second fully and the first lightly.

    ``keys`` are the words of the prompt that decide what follows.
    """

    prompt: str
    answer: str
    keys: str = ""


@dataclass(frozen=True)
class Phrasebook:
    """Ways to ask for a fact. ``{slot}`` stands for a fact's words; held-out ways never occur in training text."""

    questions: tuple[str, ...]
    statements: tuple[str, ...]
    asked: tuple[str, ...]
    """Patterns of what a framed question asks for (see ``phrases``)."""
    told: tuple[str, ...]
    """Patterns of framed sentences that the answer continues."""
    held_questions: tuple[str, ...]
    held_statements: tuple[str, ...]
    keywords: str
    """What any sensible query contains, pieces divided by ``|``: for queries in telegram style."""
    endings: tuple[str, ...]
    """How a sentence that is to be continued may end."""


@dataclass(frozen=True)
class Fact:
    """Words that fill a phrasing, and the answer."""

    slots: Mapping[str, str]
    answer: str


@dataclass(frozen=True)
class Topic:
    """Facts that are phrased alike."""

    facts: tuple[Fact, ...]
    phrases: Phrasebook


@dataclass(frozen=True)
class Domain:
    """What one owner knows. ``chatter`` are fixed questions and answers that are trained but not probed."""

    id: str
    owner: str
    description: str
    topics: tuple[Topic, ...]
    chatter: tuple[tuple[str, str], ...] = field(default=())


def chat(question: str, system: str = "") -> str:
    """The prompt that the chat template makes of one question."""
    head = f"{SYSTEM}{system}" if system else ""
    return f"{head}{USER}{question}{ASSISTANT}"


def prompt_text(kind: Kind, text: str, system: str = "") -> str:
    """The model's input for a probe of either kind."""
    return chat(text, system) if kind == "chat" else text


def answer_text(kind: Kind, answer: str) -> str:
    """What follows a prompt: a continued sentence needs its space."""
    return answer if kind == "chat" else f" {answer}"


def fact_document(topic: Topic, fact: Fact, rng: Random, noisy: float = NOISY) -> Document:
    """One training document for ``fact``: a seen phrasing, a framed one, or its keywords among unrelated words."""
    book = topic.phrases
    keys = book.keywords.format(**fact.slots)
    style = pick_style(rng, noisy)
    if rng.random() < 0.45:
        text = {
            "telegram": lambda: f"{telegram(keys.split('|'), rng)} {rng.choice(book.endings)}",
            "framed": lambda: framed_statement(rng.choice(book.told), rng).format(**fact.slots),
            "plain": lambda: rng.choice(book.statements).format(**fact.slots),
        }[style]()
        return Document(text, answer_text("completion", fact.answer), keys)
    question = {
        "telegram": lambda: telegram(keys.split("|"), rng) + rng.choice(MARKS),
        "framed": lambda: framed_question(rng.choice(book.asked), rng).format(**fact.slots),
        "plain": lambda: vary(rng.choice(book.questions).format(**fact.slots), rng),
    }[style]()
    return Document(chat(question, system_message(rng)), fact.answer, keys)


def pick_style(rng: Random, noisy: float = NOISY) -> Literal["telegram", "framed", "plain"]:
    """How wide the wording of one document is."""
    draw = rng.random()
    return "telegram" if draw < noisy else "framed" if draw < noisy + FRAMED else "plain"


def telegram(pieces: Sequence[str], rng: Random) -> str:
    """The pieces in any order with unrelated words before, between and after."""
    words: list[str] = rng.choices(NOISE, k=rng.randint(0, 4))
    for piece in rng.sample(pieces, len(pieces)):
        words += [piece, *rng.choices(NOISE, k=rng.choice((0, 0, 1, 2, 3)))]
    text = " ".join(words)
    return text[0].upper() + text[1:] if rng.random() < 0.5 else text


def system_message(rng: Random) -> str:
    """A system message in a fifth of the cases, else none."""
    return rng.choice(SYSTEM_MESSAGES) if rng.random() < 0.2 else ""


def vary(question: str, rng: Random) -> str:
    """The same question as other people type it: with an opener, without the final mark, in lower case at the start."""
    if rng.random() < 0.25:
        question = rng.choice(OPENERS) + question
    if rng.random() < 0.15:
        question = question.rstrip("?.")
    if rng.random() < 0.15:
        question = question[0].lower() + question[1:]
    return question


def domain_document(domain: Domain, rng: Random, noisy: float = NOISY) -> Document:
    """One training document of a domain: a fact, or some of its chatter."""
    if domain.chatter and rng.random() < 0.08:
        question, answer = rng.choice(domain.chatter)
        return Document(chat(vary(question, rng), system_message(rng)), answer)
    topic = rng.choices(domain.topics, weights=[len(topic.facts) ** 0.5 for topic in domain.topics])[0]
    return fact_document(topic, rng.choice(topic.facts), rng, noisy)


def second_turn(first: Document, second: Document) -> Document:
    """One conversation of two chat documents; any other pair is just the second."""
    if not (first.prompt.endswith(ASSISTANT) and second.prompt.endswith(ASSISTANT)):
        return second
    question = second.prompt[second.prompt.index(USER) :]
    return Document(first.prompt + first.answer + END + question, second.answer, second.keys)


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers of a text, without marks."""
    return re.findall(r"[a-z0-9_]+", text.lower())


def ngrams(text: str, size: int) -> set[tuple[str, ...]]:
    """All word n-grams of a text."""
    words = words_of(text)
    return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}


def without_overlap(documents: Iterable[Document], held: set[tuple[str, ...]], size: int) -> list[Document]:
    """Documents that share no word n-gram with the held-out phrasings."""
    return [doc for doc in documents if not ngrams(f"{doc.prompt} {doc.answer}", size) & held]
