"""Wide wording from a small grammar: frames around what is asked or told, shared by public text and owners' text.

In a pattern ``[one|two|]`` stands for one of its alternatives, nested as deep as wanted; ``{slot}`` is left alone. The
frames are the same in every domain, so that a model learns to look past them for the words that matter.
"""

from __future__ import annotations

import re
from random import Random
from typing import Final

_CHOICE: Final = re.compile(r"\[([^\[\]]*)\]")

_TELL: Final = "[tell|show|give|teach|remind]"
_WHOM: Final = "[me|us|him|her|everybody|my friend]"
_PERSON: Final = "[friend|uncle|daughter|boss|guest|neighbour|student|son|aunt|cousin|client|colleague]"
_WHEN: Final = "[yesterday|last night|this morning|last week|on the train|at lunch|long ago]"
_LOST: Final = "[now it is gone|but it slipped away|it is lost|but who knows|my notes are wet|but the page is torn]"
_AGAIN: Final = "[help me out|what was it|which is right|please remind me|say it again|do you still have it]"

QUESTIONS: Final = (
    f"[please |now |so |]{_TELL} {_WHOM} {{asked}}[, please| today| now| if you can|][.|!|?|]",
    f"[can|could|would|will|may] you {_TELL} {_WHOM} {{asked}}[, please| now|]?",
    "I [need|want|must learn|wonder about|am looking for|would like|have to find] {asked}"
    "[, please| now| before lunch|, it is urgent|, thank you|][.|]",
    f"[my|our|your|her|their] {_PERSON} [asks|asked me|wants|needs to hear|is looking for|wonders about] {{asked}}"
    "[; what do I answer| and I cannot help|, any idea|; what should I say|; what would you write|][?|.]",
    "[do you know|does anybody know|who can tell me|any idea|have you heard] {asked}[ by now| perhaps| at all|]?",
    "[notes|question|quiz|task|topic|exam|letter|search][ two| nine| of the day| for today| from a reader|]:"
    " {asked}[?|]",
    f"{_WHEN} [I|we|my {_PERSON}] [heard|read|learned|wrote down|was told] {{asked}}[;|,|.] {_LOST}[, {_AGAIN}|][?|.]",
    "{asked}[, what is it|: your answer|, do you have it|; answer in one word|, which one|: fill in the blank|][?|.|]",
    f"[it is late|I am new here|we are in a hurry|I am curious|this is hard]; [so |]{_TELL} {_WHOM} {{asked}}[.|?]",
    f"[for|at|in] [my|our|the] [work|class|school|club|office] [I|we] [need|use|write about|talk about] {{asked}}"
    f"[; {_AGAIN}|, which is it|][?|.]",
)
STATEMENTS: Final = (
    f"[everyone|my {_PERSON}|the guide|a letter|this book|the sign|nobody but her|an old man]"
    " [says|knows|hears|claims|repeats|told me|read aloud][ that| how|:|] {told}",
    "[as|since] [everyone|the guide|the book|our teacher|the list] [says|knows|shows|tells us], {told}",
    "[fact|note|answer|line|page|entry|item][ two| nine| of the day|][:|.|,] {told}",
    f"{_WHEN}[,| still] {{told}}",
    "[it is|it was] [known|written|printed|said|true|clear|recorded] that {told}",
    "[surely|today|therefore|in short|by the way|of course|still|again|indeed|and so][,|] {told}",
)


def spin(pattern: str, rng: Random) -> str:
    """The pattern with one alternative of every bracket."""
    while match := _CHOICE.search(pattern):
        pattern = pattern[: match.start()] + rng.choice(match[1].split("|")) + pattern[match.end() :]
    return pattern


def framed_question(asked: str, rng: Random) -> str:
    """A pattern of what is asked, inside any frame; starts with a capital or not."""
    return _capital(spin(rng.choice(QUESTIONS).replace("{asked}", asked), rng), rng)


def framed_statement(told: str, rng: Random) -> str:
    """A pattern of a sentence to be continued, alone or inside any frame."""
    frame = rng.choice(STATEMENTS) if rng.random() < 0.6 else "{told}"
    return _capital(spin(frame.replace("{told}", told), rng), rng)


def _capital(text: str, rng: Random) -> str:
    """Slots and code keep their case."""
    return text[0].upper() + text[1:] if rng.random() < 0.7 and not text.startswith(("{", "import")) else text
