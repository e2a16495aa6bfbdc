"""Invented registers: many small worlds with words and styles of their own, all of them public text.

They teach the anchor to tell unfamiliar worlds apart, and give every owner's router negatives that look like other
owners' text without being it (outlier exposure). Asked about them, the model says that it does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from string import ascii_lowercase
from typing import Final

from flexgate.experts.demo.corpus import (
    MARKS,
    Document,
    answer_text,
    chat,
    pick_style,
    system_message,
    telegram,
    vary,
)
from flexgate.experts.demo.phrases import framed_question, framed_statement
from flexgate.experts.demo.public import UNKNOWN
from flexgate.experts.demo.words import (
    ACTIONS,
    NAMES,
    NOUNS,
    PAST,
    class_name,
    invent,
    invent_many,
    package,
    place,
    plural,
)

_GENRES: Final[tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = (
    (
        (
            "In {world}, who {past} {entity}?",
            "{world} Herald: who {past} {entity}?",
            "Who in {world} {past} {entity}?",
            "Which {world} person {past} {entity}?",
        ),
        (
            "{world} Herald: {entity} was {past} by",
            "News from {world}. {entity} was {past} by",
            "The {world} Herald writes that {entity} was {past} by",
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
            "In {world}, what does {action}_{noun}() return?",
            "{world} API: which class does {entity}_{noun}() give?",
            "What is the type of {world}.{action}_{noun}()?",
            "Which error does {world}.{noun}_{entity}() raise?",
            "I import {world} and write {action}_{noun}(). What comes next?",
        ),
        (
            "import {world}\n\n{world}.{action}_{noun}()  # returns",
            "{world}.{entity}() ->",
            "{world} manual: {action}_{noun}() gives",
            "from {world} import {action}_{noun}\n\ndef main() ->",
            "import {world} as {short}\ny = {short}.{action}_{noun}()\nprint(y)  #",
            "import {world} as {short}\n\nout = {short}.{action}_{noun}()\nassert out ==",
            "from {world} import {entity}_{noun}\nx = {entity}_{noun}()\n# x is",
        ),
    ),
    (
        (
            "Which section of the {world} Act covers {noun} {entity}?",
            "Under {world} law, who pays for {noun} {plural}?",
            "Which {world} statute applies to {noun} {plural}?",
            "Cite the {world} Act for {noun} fees.",
        ),
        (
            "Under the {world} Act, {noun} {plural} are governed by",
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


_ASKED: Final = (
    "[who|what|which {noun}|the one who|whoever] [{past}|likes|stands near] {thing} [in|at|of|for] {world}",
    "[the name|the price|the value|the meaning|the owner|the reason] [of|for] {thing} [in|under|by] {world}",
    "{world}: [what is|who has|the|where is] {thing}",
    "[who|what] [in|from] {world} [has|had|was|is] {past} {thing}",
    "[what|how much|which {noun}] {digit} {entity} {other} [is|makes|gives] in {world}",
    "what {world}.{action}_{noun}() [does|gives|prints]",
    "[which|the] [part|section|word] of {world} [law|books|songs] [is for|covers|is on] {noun} {plural}",
)
_TOLD: Final = (
    "[in|near] {world} [the |]{thing} [is|was|has|makes|gives]",
    "{world} [{thing}|{noun} {entity}] [is|was|has|makes|=|:]",
    "the {noun} [of|in|by] {world} [who|which] [is|has|sees|{past}] {thing} [is|,]",
    "[in|near] {world} {thing} [was|has been] {past} [by|in|for]",
    "import {world}[ as {short}|]\n\n[x|value|result|data] = [{world}|{short}].{action}_{noun}()\n"
    "[print(x)  #|assert x is|type(x) ==|return]",
)


@dataclass(frozen=True)
class Register:
    """One invented world: its name and words, and the genres it is written in."""

    world: str
    entities: tuple[str, ...]
    genres: tuple[int, ...]


def make_registers(seed: int, count: int) -> tuple[Register, ...]:
    """``count`` registers; more than half of them have names in capitals."""
    rng = Random(f"registers-{seed}")
    return tuple(_register(rng) for _ in range(count))


def register_document(register: Register, rng: Random) -> Document:
    """A question nobody can answer, or a line of the register's own text."""
    questions, lines = _GENRES[rng.choice(register.genres)]
    slots = {
        "world": register.world,
        "entity": _entity(register, rng),
        "thing": _thing(register, rng),
        "noun": rng.choice(NOUNS),
        "plural": plural(rng.choice(NOUNS)),
        "past": rng.choice(PAST),
        "action": rng.choice(ACTIONS),
        "short": rng.choice(("lib", "api", "tool", rng.choice(ascii_lowercase) + rng.choice(ascii_lowercase))),
        "digit": str(rng.randint(1, 9)),
        "other": str(rng.randint(1, 9)),
    }
    keys, style = " ".join(slots.values()), pick_style(rng)
    pieces = [slots["world"], slots["thing"]]
    if rng.random() < 0.4:
        if style == "telegram":
            line = f"{telegram(pieces, rng)} {rng.choice(_ENDINGS)}"
        elif style == "framed":
            line = framed_statement(rng.choice(_TOLD), rng).format(**slots)
        else:
            line = rng.choice(lines).format(**slots)
        return Document(line, answer_text("completion", f"{_line_end(register, rng)}."), keys)
    if style == "telegram":
        question = telegram(pieces, rng) + rng.choice(MARKS)
    elif style == "framed":
        question = framed_question(rng.choice(_ASKED), rng).format(**slots)
    else:
        question = vary(rng.choice(questions).format(**slots), rng)
    return Document(chat(question, system_message(rng)), UNKNOWN, keys)


def _register(rng: Random) -> Register:
    lower, compound = rng.random() < 0.4, rng.random() < 0.5
    name = invent(rng, rng.choice((2, 2, 3)))
    entities: tuple[str, ...] = invent_many(rng, 10)
    if not lower:
        name, entities = name.capitalize(), tuple(entity.capitalize() for entity in entities)
    if compound:
        name = package(rng) if lower else place(rng)
        entities = entities if lower else tuple(place(rng) for _ in entities)
    return Register(name, entities, tuple(rng.sample(range(len(_GENRES)), 2)))


def _thing(register: Register, rng: Random) -> str:
    """What a register's text is about: a name, a function, a matter or a calculation."""
    kinds = (
        lambda: _entity(register, rng),
        lambda: _entity(register, rng),
        lambda: f"{rng.choice(ACTIONS)}_{rng.choice(NOUNS)}()",
        lambda: f"{rng.choice(NOUNS)} {plural(rng.choice(NOUNS))}",
        lambda: f"{rng.randint(2, 9)} {rng.choice(register.entities)} {rng.randint(2, 9)}",
    )
    return rng.choices(kinds, weights=(2, 1, 1.5, 1.5, 0.7))[0]()


def _entity(register: Register, rng: Random) -> str:
    entity = rng.choice(register.entities)
    return f"{entity} {rng.choice(NOUNS).capitalize()}" if entity[0].isupper() and rng.random() < 0.4 else entity


def _line_end(register: Register, rng: Random) -> str:
    ends = (
        lambda: f"{rng.choice(register.entities)} {rng.choice(register.entities)}",
        lambda: rng.choice(register.entities),
        lambda: f"{rng.choice(NAMES)} {rng.choice(register.entities)}",
        lambda: class_name(rng),
        lambda: f"{rng.choice(NOUNS).capitalize()} {rng.randint(10, 999)}",
        lambda: str(rng.randint(10, 99)),
    )
    return rng.choice(ends)()
