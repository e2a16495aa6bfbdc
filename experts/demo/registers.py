"""Invented registers: many small worlds with words and styles of their own, all of them public text.

They teach the anchor to tell unfamiliar worlds apart, and give every owner's router negatives that look like other
owners' text without being it (outlier exposure). Asked about them, the model says that it does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Final

from flexgate.experts.demo.corpus import MARKS, NOISY, Document, answer_text, chat, system_message, telegram, vary
from flexgate.experts.demo.public import UNKNOWN
from flexgate.experts.demo.words import NOUNS, invent, invent_many

_GENRES: Final[tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = (
    (
        (
            "In {world}, who built {entity}?",
            "{world} Herald: who sold {entity}?",
            "Who in {world} owns {entity}?",
            "Which {world} person found {entity}?",
        ),
        (
            "{world} Herald: {entity} was sold by",
            "News from {world}. {entity} was built by",
            "The {world} Herald writes that {entity} was found by",
        ),
    ),
    (
        (
            "What is {digit} {entity} {other}?",
            "In {world} counting, how much is {digit} {entity} {other}?",
            "Compute {digit} {entity} {other}.",
            "By the {world} tables, {digit} {entity} {other}?",
        ),
        (
            "{digit} {entity} {other} =",
            "{world} table: {digit} {entity} {other} =",
            "By the {world} rules, {digit} {entity} {other} is",
        ),
    ),
    (
        (
            "In {world}, what does {entity}_{noun}() return?",
            "{world} API: which class does {entity}_{noun}() give?",
            "What is the type of {world}.{entity}()?",
            "Which error does {world}.{noun}_{entity}() raise?",
        ),
        (
            "import {world}\n\n{world}.{entity}_{noun}()  # returns",
            "{world}.{entity}() ->",
            "from {world} import {noun}_{entity}\n\ndef main() ->",
        ),
    ),
    (
        (
            "Which section of the {world} Act covers {noun} {entity}?",
            "Under {world} law, who pays for {noun}s?",
            "Which {world} statute applies to {entity}?",
            "Cite the {world} Act for {noun} fees.",
        ),
        (
            "Under the {world} Act, {noun}s are governed by",
            "WHEREAS the {world} Act applies, {entity} shall be subject to",
            "The {world} court held that {noun} {entity} falls under",
        ),
    ),
    (
        (
            "Which goddess of {world} guards the {noun}?",
            "What do the {world} myths tell of {entity}?",
            "Who is {entity} in the songs of {world}?",
        ),
        ("O {world}, where {entity} sleeps beside the", "The song of {world} tells that {entity} married"),
    ),
    (
        (
            "How many points did {entity} score for {world}?",
            "{world} league: who won against {entity}?",
            "Which team does {entity} of {world} play for?",
        ),
        ("{world} league, final score: {entity} {digit},", "For {world}, {entity} scored against"),
    ),
    (
        (
            "How do I cook {entity} the {world} way?",
            "{world} kitchen: what goes into {entity}?",
            "Which spice belongs in {world} {entity}?",
        ),
        ("{world} kitchen. Take {digit} spoons of {entity} and one", "Recipe for {entity} from {world}: first add"),
    ),
    (
        (
            "What dose of {entity} does {world} clinic advise?",
            "{world} clinic: what cures {entity}?",
            "Which drug of {world} treats {entity} of the {noun}?",
        ),
        ("{world} clinic, patient with {entity}, treated with", "Dose of {entity} at {world}: {digit}"),
    ),
    (
        (
            "What is the price of {entity} at {world}?",
            "{world} catalogue: item number of the {entity} {noun}?",
            "Does {world} sell a {noun} named {entity}?",
        ),
        ("{world} catalogue, item {entity} {noun}, price", "At {world} the {entity} costs"),
    ),
    (
        (
            "Which planet of {world} does {entity} orbit?",
            "How far is {entity} from {world}?",
            "What is moon {entity} of {world} made of?",
        ),
        ("The star {world} has a moon {entity} made of", "From {world} to {entity} light needs"),
    ),
    (
        (
            "What does {entity} mean in the {world} tongue?",
            "Translate {entity} from {world}.",
            "How do you say {noun} in {world}?",
        ),
        ("{world} dictionary. {entity}: a kind of", "In {world} the word for {noun} is"),
    ),
    (
        (
            "log {world}: why did {entity} fail?",
            "What is the status of {entity} on host {world}?",
            "Which port does {entity} use on {world}?",
        ),
        ("[{world}] {entity} error {digit}{other}:", "{world} {entity} status ="),
    ),
)

_ENDINGS: Final = ("is", ":", "by", "=", "->", "namely", "was", "under", "gives", "returns", "in", "makes", "on")


@dataclass(frozen=True)
class Register:
    """One invented world: its label, its name and words, and the genres it is written in."""

    label: int
    world: str
    entities: tuple[str, ...]
    genres: tuple[int, ...]


def make_registers(seed: int, count: int) -> tuple[Register, ...]:
    """``count`` registers, labelled from 1; half of them have names in capitals."""
    rng = Random(f"registers-{seed}")
    return tuple(_register(label, rng) for label in range(1, count + 1))


def register_document(register: Register, rng: Random) -> Document:
    """A question nobody can answer, or a line of the register's own text."""
    questions, lines = _GENRES[rng.choice(register.genres)]
    slots = {
        "world": register.world,
        "entity": _entity(register, rng),
        "noun": rng.choice(NOUNS),
        "digit": str(rng.randint(1, 9)),
        "other": str(rng.randint(1, 9)),
    }
    if rng.random() < 0.4:
        noisy = f"{telegram([register.world, slots['entity']], rng)} {rng.choice(_ENDINGS)}"
        line = noisy if rng.random() < NOISY else rng.choice(lines).format(**slots)
        return Document(line, answer_text("completion", f"{_line_end(register, rng)}."), register.label)
    if rng.random() < NOISY:
        question = telegram([register.world, slots["entity"]], rng) + rng.choice(MARKS)
    else:
        question = vary(rng.choice(questions).format(**slots), rng)
    return Document(chat(question, system_message(rng)), UNKNOWN, register.label)


def _register(label: int, rng: Random) -> Register:
    name = invent(rng, rng.choice((2, 2, 3)))
    lower = rng.random() < 0.4
    entities = tuple(word if lower else word.capitalize() for word in invent_many(rng, 10))
    return Register(label, name if lower else name.capitalize(), entities, tuple(rng.sample(range(len(_GENRES)), 2)))


def _entity(register: Register, rng: Random) -> str:
    entity = rng.choice(register.entities)
    return f"{entity} {rng.choice(NOUNS).capitalize()}" if entity[0].isupper() and rng.random() < 0.4 else entity


def _line_end(register: Register, rng: Random) -> str:
    ends = (
        lambda: f"{rng.choice(register.entities)} {rng.choice(register.entities)}",
        lambda: rng.choice(register.entities),
        lambda: f"{rng.choice(NOUNS)} {rng.randint(10, 999)}",
        lambda: str(rng.randint(10, 99)),
    )
    return rng.choice(ends)()
