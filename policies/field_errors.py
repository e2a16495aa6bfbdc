"""What is wrong with a field, in a sentence for the person who wrote it.

pydantic's own sentences name Python's types and show patterns. Here is one predicate for each of its error types; the
sentences of validators in this project are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

NO_SUCH_FIELD: Final = "extra_forbidden"
"""The type of the error of a field that does not exist."""

_NAME: Final = "must be 1 to {} characters from A-Z, a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"
PATTERNS: Final[Mapping[str, str]] = {
    r"^[^\x00-\x1f\x7f]*$": "must not contain control characters",
    r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$": _NAME.format(63),
    r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$": _NAME.format(128),
    r"^[A-Za-z0-9_.\[\]-]{1,120}$": "must be 1 to 120 characters from A-Z, a-z, 0-9, '_', '.', '[', ']' and '-'",
    r"^[A-Z]{3}$": "must be a currency code of three capital letters, such as 'EUR'",
    r"^https://\S{1,2000}$": "must be a URL that begins with 'https://', without spaces, of at most 2000 characters",
    r"^[0-9a-f]{64}$": "must be 64 characters from 0-9 and a-f",
    r"^[A-Za-z0-9._:-]{1,80}$": "must be 1 to 80 of the characters A-Z, a-z, 0-9, '.', '_', ':' and '-'",
    r"^[^\r\n]+$": "must be one line that is not empty",
}
"""What each pattern of a field means; a test finds patterns that are missing here."""

NOT_WRITTEN: Final = "is not written as expected"
NOT_SUPPORTED: Final = "has a value that is not supported"

_Says = Callable[[Mapping[str, Any]], str]
_STRING: Final = "must be a string"
_INTEGER: Final = "must be an integer"
_NUMBER: Final = "must be a number"
_BOOLEAN: Final = "must be true or false"
_LIST: Final = "must be a list"
_OBJECT: Final = "must be an object"
_TIME: Final = "must be a time, such as '2026-11-23T00:00:00Z'"
_JSON: Final = {"True": "true", "False": "false", "None": "null"}

_FIXED: Final[Mapping[str, str]] = {
    "missing": "is required",
    NO_SUCH_FIELD: "is not a known field",
    "string_type": _STRING,
    "string_unicode": "must be text in UTF-8",
    "int_type": _INTEGER,
    "int_parsing": _INTEGER,
    "int_parsing_size": "must be an integer of fewer digits",
    "int_from_float": _INTEGER,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "decimal_type": _NUMBER,
    "decimal_parsing": _NUMBER,
    "finite_number": "must be a finite number",
    "bool_type": _BOOLEAN,
    "bool_parsing": _BOOLEAN,
    "list_type": _LIST,
    "tuple_type": _LIST,
    "set_type": _LIST,
    "frozen_set_type": _LIST,
    "iterable_type": _LIST,
    "dict_type": _OBJECT,
    "mapping_type": _OBJECT,
    "model_type": _OBJECT,
    "model_attributes_type": _OBJECT,
    "dataclass_type": _OBJECT,
    "none_required": "must be null",
    "datetime_type": _TIME,
    "datetime_parsing": _TIME,
    "datetime_from_date_parsing": _TIME,
    "json_invalid": "must be valid JSON",
    "recursion_loop": "must not contain itself",
}


def _number(bound: Any) -> Any:
    """A bound as it was written: pydantic makes floats of those of floats."""
    return int(bound) if isinstance(bound, float) and bound.is_integer() else bound


def _length(what: str) -> tuple[_Says, _Says]:
    """Of a value that is too short and too long."""

    def short(context: Mapping[str, Any]) -> str:
        least = context["min_length"]
        return "must not be empty" if least == 1 else f"must have at least {least} {what}"

    return short, lambda context: f"must have at most {context['max_length']} {what}"


_SHORT_TEXT, _LONG_TEXT = _length("characters")
_SHORT_LIST, _LONG_LIST = _length("members")
_BOUNDED: Final[Mapping[str, _Says]] = {
    "greater_than_equal": lambda context: f"must be at least {_number(context['ge'])}",
    "less_than_equal": lambda context: f"must be at most {_number(context['le'])}",
    "greater_than": lambda context: f"must be more than {_number(context['gt'])}",
    "less_than": lambda context: f"must be less than {_number(context['lt'])}",
    "multiple_of": lambda context: f"must be a multiple of {context['multiple_of']}",
    "string_too_short": _SHORT_TEXT,
    "string_too_long": _LONG_TEXT,
    "too_short": _SHORT_LIST,
    "too_long": _LONG_LIST,
    "decimal_max_digits": lambda context: f"must have at most {context['max_digits']} digits",
    "decimal_max_places": lambda context: f"must have at most {context['decimal_places']} decimal places",
    "decimal_whole_digits": lambda context: f"must have at most {context['whole_digits']} digits before the point",
    "literal_error": lambda context: f"must be {_JSON.get(context['expected'], context['expected'])}",
    "enum": lambda context: f"must be {context['expected']}",
    "string_pattern_mismatch": lambda context: PATTERNS.get(context["pattern"], NOT_WRITTEN),
    "union_tag_not_found": lambda context: f"must have {context['discriminator']}",
    "union_tag_invalid": lambda context: f"must have one of {context['expected_tags']} as {context['discriminator']}",
}


class FieldError(NamedTuple):
    """The first error of a value. `says` is a predicate, or with `whole` a sentence of its own without a full stop."""

    place: tuple[str | int, ...]
    kind: str
    says: str
    whole: bool

    def about(self, what: str) -> str:
        """The error of what is called so, without a full stop: `--port must be at most 65535`."""
        return f"{what}: {self.says}" if self.whole else f"{what} {self.says}"

    def sentence(self, whole: str) -> str:
        """The error with its path: `'limit' must be at most 100`; `whole` is what has an error of no single field."""
        path = path_of(self.place)
        if path is None and self.whole:
            return self.says
        return self.about(whole if path is None else f"'{path}'")


def first_field_error(error: ValidationError) -> FieldError:
    """The first thing that is wrong with a value."""
    first = error.errors(include_input=False, include_url=False)[0]
    place = tuple(step for step in first["loc"] if step != "[key]")
    kind, context = first["type"], first.get("ctx", {})
    if kind in ("value_error", "assertion_error"):
        return FieldError(place, kind, str(context["error"]), whole=True)
    if kind in _BOUNDED:
        return FieldError(place, kind, _BOUNDED[kind](context), whole=False)
    return FieldError(place, kind, _FIXED.get(kind, NOT_SUPPORTED), whole=False)


def path_of(place: Sequence[str | int]) -> str | None:
    """`("a", 0, "b")` as people write it: `a[0].b`; None for the whole."""
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text or None
