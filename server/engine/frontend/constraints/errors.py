"""Why a constraint cannot be kept."""

from __future__ import annotations

import re
from typing import Final

_PLACE: Final = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ")
_PARSER: Final = re.compile(r"^(EBNF parser error at line \d+, column \d+: |Regex parsing error )")
MAX_MESSAGE: Final = 300  # a pipe holds them, however they are encoded
_INNER: Final = re.compile(r"/|\.cc|\.h\b|Check failed|0x|::")


class ConstraintError(ValueError):
    """A constraint that this server does not follow; the message says why, for the client."""


class Unenforceable(ConstraintError):
    """A part of a constraint that the compiler would ignore or read in another way."""


def compiler_message(text: str) -> str:
    """What the compiler says of a client's text, in 300 characters, without its own source files and checks."""
    sentence = _PARSER.sub("", _PLACE.split(text.strip())[-1].split("\n")[0]).strip()
    if not sentence or _INNER.search(sentence):
        return "it cannot be compiled"
    return sentence[0].lower() + sentence[1:MAX_MESSAGE].rstrip(".")
