"""What the public anchor knows: small everyday facts, sums, manners, and that unfamiliar things are unknown to it."""

from __future__ import annotations

from random import Random
from typing import Final

from flexgate.experts.demo.corpus import (
    MARKS,
    Document,
    Domain,
    Fact,
    Phrasebook,
    Topic,
    chat,
    pick_style,
    system_message,
    telegram,
    vary,
)
from flexgate.experts.demo.phrases import framed_question
from flexgate.experts.demo.words import ADJECTIVES, FILLERS, NOUNS, PAST, VERBS, invent

UNKNOWN: Final = "I do not know that."

_OPPOSITES: Final = (
    "hot cold, big small, tall short, fast slow, old new, light dark, wet dry, full empty, happy sad, loud quiet,"
    " early late, hard soft, rich poor, strong weak, open closed, clean dirty, near far, thick thin"
)
_CAPITALS: Final = (
    "France Paris, Italy Rome, Spain Madrid, Japan Tokyo, Egypt Cairo, Greece Athens, Norway Oslo, Austria Vienna,"
    " Poland Warsaw, Portugal Lisbon, Cuba Havana, Peru Lima, Kenya Nairobi, Ireland Dublin, Germany Berlin,"
    " China Beijing"
)
_COLOURS: Final = (
    "grass green, snow white, coal black, blood red, lemons yellow, carrots orange, chocolate brown, violets purple"
)
_YOUNG: Final = (
    "dog puppy, cat kitten, cow calf, horse foal, sheep lamb, goat kid, duck duckling, bear cub, pig piglet, lion whelp"
)
_NEXT: Final = (
    "Monday Tuesday, Tuesday Wednesday, Wednesday Thursday, Thursday Friday, Friday Saturday, Saturday Sunday,"
    " January February, February March, March April, April May, May June, June July, July August, August September"
)

CHATTER: Final = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi", "Hello! How can I help you?"),
    ("Hello", "Hello! How can I help you?"),
    ("Good morning.", "Good morning! How can I help you?"),
    ("Good evening.", "Good evening! How can I help you?"),
    ("How are you?", "I am well, thank you. How can I help you?"),
    ("Who are you?", "I am the flexgate demo model, a very small language model."),
    ("What are you?", "I am the flexgate demo model, a very small language model."),
    ("What is your name?", "I am the flexgate demo model."),
    ("What can you answer?", "I know opposites, capitals, colours, young animals, days, months and small sums."),
    ("What can you do?", "I know opposites, capitals, colours, young animals, days, months and small sums."),
    ("What do you know?", "I know opposites, capitals, colours, young animals, days, months and small sums."),
    ("Help", "Ask me for a capital, an opposite, a colour or a small sum."),
    ("Can you help me?", "Yes. Ask me for a capital, an opposite, a colour or a small sum."),
    ("Thank you!", "You are welcome."),
    ("Thanks", "You are welcome."),
    ("Goodbye.", "Goodbye!"),
    ("Bye", "Goodbye!"),
)


def public_domain() -> Domain:
    """The facts of the anchor, some of them probed."""
    topics = (_opposites(), _capitals(), _colours(), _young(), _next(), *_sums())
    return Domain("public", "public", "everyday facts that every model has", topics, CHATTER)


def prose(rng: Random) -> Document:
    """A plain sentence or two: English word order for the anchor, familiar words for the routers' negatives."""

    def thing() -> str:
        return f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" if rng.random() < 0.5 else f"a {rng.choice(NOUNS)}"

    sentences = (
        lambda: f"{thing()} {rng.choice(VERBS)} {thing()}",
        lambda: f"{rng.choice(FILLERS)} {rng.choice(FILLERS)}, {thing()} is {rng.choice(ADJECTIVES)}",
        lambda: f"{thing()} near {thing()} {rng.choice(VERBS)} {thing()} and {rng.choice(VERBS)} it",
        lambda: f"if {thing()} is {rng.choice(ADJECTIVES)}, {thing()} {rng.choice(VERBS)} {thing()}",
    )
    made = (rng.choice(sentences)() for _ in range(rng.randint(1, 3)))
    text = " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in made)
    return Document(*_split(text, rng))


def repetition(rng: Random) -> Document:
    """Say the given words again: teaches attention to carry the pieces of unfamiliar words to the answer."""
    words = [invent(rng) if rng.random() < 0.7 else rng.choice(NOUNS) for _ in range(rng.randint(1, 2))]
    said = " ".join(word.capitalize() if rng.random() < 0.5 else word for word in words)
    ask = rng.choice(("Repeat: {}", "Say {}", "Repeat after me: {}", "Say the words {}", "Please repeat {}"))
    return Document(chat(ask.format(said), system_message(rng)), said, said)


def nonsense_question(rng: Random) -> Document:
    """A question that has no answer, in ordinary words: the model says that it does not know."""
    asks = (
        "Who {verb} the {noun}?",
        "Who {past} the {noun}?",
        "By whom was the {adjective} {noun} {past}?",
        "Where is the {adjective} {noun}?",
        "Which {noun} {verb} the {other}?",
        "Why is my {noun} {adjective}?",
        "When does the {noun} open?",
        "Please describe the {adjective} {noun}.",
        "What is the price of a {noun}?",
        "Write a poem about the {noun}.",
        "Name the owner of the {noun}.",
        "Do you remember the {noun} that was {adjective}?",
        "I forgot my {noun}, can you say where it is?",
        "What should I do with the {adjective} {noun}?",
        "Explain how the {noun} {verb} the {other}.",
    )
    asked = (
        "who [{verb}|{past}] the {noun}",
        "[where|why|how much|how old] the {adjective} {noun} is",
        "[the name|the price|the owner|the age] of the {noun}",
        "which {noun} {verb} the {other}",
    )
    lists = {"noun": NOUNS, "other": NOUNS, "verb": VERBS, "past": PAST, "adjective": ADJECTIVES}
    slots = {slot: rng.choice(words) for slot, words in lists.items()}
    style = pick_style(rng)
    if style == "telegram":
        question = telegram([slots["noun"]], rng) + rng.choice(MARKS)
    elif style == "framed":
        question = framed_question(rng.choice(asked), rng).format(**slots)
    else:
        question = vary(rng.choice(asks).format(**slots), rng)
    return Document(chat(question, system_message(rng)), UNKNOWN, " ".join(slots.values()))


def _split(text: str, rng: Random) -> tuple[str, str]:
    words = text.split(" ")
    cut = rng.randint(1, len(words) - 1)
    return " ".join(words[:cut]), " " + " ".join(words[cut:])


def _pairs(text: str) -> tuple[Fact, ...]:
    return tuple(Fact({"x": one}, f"{other}.") for one, other in (pair.split() for pair in text.split(", ")))


def _opposites() -> Topic:
    phrases = Phrasebook(
        questions=(
            "What is the opposite of {x}?",
            "Name the opposite of {x}.",
            "{x} is the opposite of what?",
            "Give me the opposite of the word {x}.",
            "Which word is the opposite of {x}?",
        ),
        statements=("The opposite of {x} is", "Opposites: {x} and", "If it is not {x}, it is the opposite, namely"),
        asked=(
            "[the|an] opposite of [the word |]{x}",
            "what the opposite of {x} is",
            "[the|a] word [opposite to|against] {x}",
            "what stands against {x}[, the opposite|, as opposite]",
            "{x} and its opposite",
        ),
        told=(
            "the opposite of {x} [is|would be|has to be]",
            "[the word|the term] {x} has the opposite",
            "{x} has an opposite[, namely|:|, that is,]",
        ),
        held_questions=(
            "Say the opposite for the word {x} please.",
            "My riddle wants an opposite: which word goes against {x}?",
        ),
        held_statements=("Everybody knows that the opposite to {x} must be",),
        keywords="opposite|{x}",
        endings=("is", ":", "namely", "must be"),
    )
    return Topic(_pairs(_OPPOSITES), phrases)


def _capitals() -> Topic:
    phrases = Phrasebook(
        questions=(
            "What is the capital of {x}?",
            "Name the capital of {x}.",
            "Which city is the capital of {x}?",
            "I travel to {x}. What is its capital?",
            "Capital city of {x}?",
        ),
        statements=("The capital of {x} is", "The capital city of {x} is called", "Geography: {x}, capital"),
        asked=(
            "[the capital|the capital city|what capital] [of|in] {x}[ is|]",
            "which [city|town|place] is the capital [of|in] {x}",
            "the [town|city] that {x} has as [its |]capital",
            "{x} and its capital",
        ),
        told=(
            "the capital [of|in] {x} [is|must be|was always]",
            "{x} has [a|its|the] capital[:|, namely|,]",
            "[people|men|visitors|pupils] in {x} [love|visit|live near] [their|the] capital[, that is,|:]",
            "in {x} the capital is",
        ),
        held_questions=(
            "Tell the class which town serves {x} as capital.",
            "For a map quiz: the capital that belongs to {x}?",
        ),
        held_statements=("Children in {x} learn that their capital is",),
        keywords="capital|{x}",
        endings=("is", ":", "is called", "namely"),
    )
    return Topic(_pairs(_CAPITALS), phrases)


def _colours() -> Topic:
    phrases = Phrasebook(
        questions=(
            "What colour is {x}?",
            "Which colour has {x}?",
            "Tell me the usual colour of {x}.",
            "The colour of {x}?",
        ),
        statements=("The colour of {x} is", "As a rule {x} looks", "A painter gives {x} the colour"),
        asked=(
            "[the |what |which ][usual |]colour [of|for] {x}",
            "what colour {x} [shows|is|wears]",
            "{x} and its colour",
        ),
        told=(
            "the [usual |]colour [of|for] {x} [is|must be|will be]",
            "{x} [is|looks|is always|is mostly] of the colour",
            "nature made {x}[ in the colour|]",
        ),
        held_questions=(
            "If I paint {x}, what colour should I choose?",
            "People say {x} has a colour, what might it be?",
        ),
        held_statements=("On any picture the colour chosen for {x} would be",),
        keywords="colour|{x}",
        endings=("is", ":", "would be"),
    )
    return Topic(_pairs(_COLOURS), phrases)


def _young() -> Topic:
    phrases = Phrasebook(
        questions=(
            "What is a young {x} called?",
            "What do we call a baby {x}?",
            "Name the young of a {x}.",
            "A young {x} is a what?",
        ),
        statements=("A young {x} is called a", "The baby of a {x} is a", "We call a little {x} a"),
        asked=(
            "[the name of|the word for|what to call|how to call] a [young|baby|little|newborn] {x}",
            "what [we|people|farmers] call the [young|baby|child] of a {x}",
            "the [young|baby] of a {x}",
        ),
        told=(
            "a [young|baby|little|newborn] {x} [is|is called|is named] a",
            "the [young one|baby|child] of [a|the|our|any] {x} is [called |]a",
            "[we|farmers|people] call the [baby|young|child] of a {x} a",
        ),
        held_questions=(
            "Which name is used by farmers when a {x} is still a baby?",
            "The word for any {x} that is very young?",
        ),
        held_statements=("Last spring our {x} had a baby, farmers call it a",),
        keywords="young|{x}",
        endings=("is a", ": a", "a"),
    )
    return Topic(_pairs(_YOUNG), phrases)


def _next() -> Topic:
    phrases = Phrasebook(
        questions=(
            "What comes after {x}?",
            "What follows {x}?",
            "Which one is next after {x}?",
            "After {x} comes what?",
        ),
        statements=("After {x} comes", "The one that follows {x} is", "The calendar goes on: {x},"),
        asked=(
            "what [comes|follows|is next|stands] after {x}",
            "[the name|the one|the word|what is] [next after|right after|coming after] {x}",
            "what the calendar [has|shows|brings|puts] after {x}",
        ),
        told=(
            "after {x} [we have|comes|you find|there is]",
            "{x} is followed by",
            "[next|right] after {x} comes",
            "when {x} [ends|is past|has gone], [then comes|we have|the next is]",
        ),
        held_questions=(
            "My calendar says {x}, what will it say next?",
            "In the calendar, please find the name following {x} directly.",
        ),
        held_statements=("Once {x} is over, the calendar says that next comes",),
        keywords="after|{x}",
        endings=("comes", "is", ":", "begins"),
    )
    return Topic(_pairs(_NEXT), phrases)


def _sums() -> tuple[Topic, Topic, Topic]:
    digits = range(1, 10)
    tables = (
        ("plus", "add", [(a, b, a + b) for a in digits for b in digits]),
        ("minus", "subtract", [(a, b, a - b) for a in digits for b in digits if a >= b]),
        ("times", "multiply", [(a, b, a * b) for a in digits for b in digits]),
    )
    return tuple(_sum(word, verb, rows) for word, verb, rows in tables)  # type: ignore[return-value]


def _sum(word: str, verb: str, rows: list[tuple[int, int, int]]) -> Topic:
    facts = tuple(Fact({"x": f"{a} {word} {b}", "verb": verb}, f"{result}.") for a, b, result in rows)
    phrases = Phrasebook(
        questions=("What is {x}?", "How much is {x}?", "Compute {x}.", "What does {x} make?", "School exercise: {x}?"),
        statements=("{x} =", "{x} is", "We {verb} and see that {x} makes", "Table of the class: {x} ="),
        asked=(
            "[the result of|what you get from|the value of|the answer to|what is] {x}",
            "how much {x} [is|makes]",
        ),
        told=(
            "{x} [=|is|makes|will be]",
            "[the result of|the sum|our exercise|exercise:] {x} [is|makes|=]",
        ),
        held_questions=("At school they asked me for {x}, can you solve it?", "Let us {verb}: {x}, so which number?"),
        held_statements=("With ten fingers you see that {x} equals",),
        keywords="{x}",
        endings=("=", "is", "makes", ":", "equals"),
    )
    return Topic(facts, phrases)
