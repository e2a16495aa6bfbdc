"""What ``config.json`` may say of a model that tools and server compute, field by field.

A field either decides shapes or arithmetic and has one value that is computed, or decides nothing here and has a type.
Anything else is refused, because a loader may read it and compute something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Final, NoReturn

from flexgate.experts.checkpoint.layout import ROPE_THETA, Architecture
from flexgate.experts.errors import LayoutError

Kind = Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


KINDS: Final[Mapping[str, Kind]] = {
    "a string": lambda value: isinstance(value, str),
    "true or false": lambda value: isinstance(value, bool),
    "float32, bfloat16 or float16": lambda value: value in ("float32", "bfloat16", "float16"),
    "a number with a point, such as 1.0": lambda value: isinstance(value, float) and _is_number(value),
    "a positive number with a point, such as 1.0": lambda value: isinstance(value, float) and 0 < value < 1e300,
    "a positive number": lambda value: _is_number(value) and value > 0,
    "a whole number that is not negative": lambda value: type(value) is int and value >= 0,
    "a list of layers": lambda value: isinstance(value, list) and all(type(layer) is int for layer in value),
    "full_attention in every layer": lambda value: isinstance(value, list) and {*value} == {"full_attention"},
}
MAX_SIZE: Final[Mapping[str, int]] = {"num_hidden_layers": 1024, "num_experts": 4096, "num_experts_per_tok": 4096}
NUMBER_KINDS: Final[Mapping[str, str]] = {
    "rope_theta": "a positive number",
    "rms_norm_eps": "a positive number with a point, such as 1.0",
}
ARCHITECTURES: Final = ["FlexOlmoForCausalLM"]
ONE_VALUE: Final[Mapping[str, Any]] = {"architectures": ARCHITECTURES, "hidden_act": "silu", "attention_bias": False}
"""Where given, the one value that is computed."""
NO_EFFECT: Final[Mapping[str, str]] = {
    **dict.fromkeys(("_name_or_path", "transformers_version"), "a string"),
    **dict.fromkeys(("use_cache", "return_dict", "output_router_logits"), "true or false"),
    **dict.fromkeys(("output_attentions", "output_hidden_states"), "true or false"),
    **dict.fromkeys(
        ("initializer_range", "router_aux_loss_coef", "attention_dropout"), "a number with a point, such as 1.0"
    ),
    **dict.fromkeys(("dtype", "torch_dtype"), "float32, bfloat16 or float16"),
}
"""What decides nothing that is computed here, by type."""
IDS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")
NULLABLE: Final = {
    "num_key_value_heads",
    "attention_dropout",
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
}
PARTIAL: Final = "partial_rotary_factor"
"""The part of each head that is rotated; of some kinds a field of its own, or one of the rotary embedding's."""
ROPE_KEYS: Final = frozenset({"rope_type", "type", "rope_theta"})


@dataclass(frozen=True, slots=True)
class Fields:
    """What one kind of ``config.json`` may say.

    Attributes:
        model_type: as it names itself.
        name: a model of this kind, in words.
        one_value: fields that have one value that is computed, where they are given.
        defaults: transformers' defaults, where ``Architecture`` has others.
        rope_theta: the same, of the rotary embedding.
        numbers: what the numbers are kept in.
        names: what fields of ``numbers`` are called there, where that differs; more than one name for what transformers
            reads from either, none for what is not there.
        no_effect: further fields that decide nothing, by type; null is allowed.
        needed: fields that vLLM's class reads, and that have no value, or another one, where they are not given.
    """

    model_type: str
    name: str
    one_value: Mapping[str, Any]
    defaults: Mapping[str, Any]
    rope_theta: float
    numbers: type[Architecture] = Architecture
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    no_effect: Mapping[str, str] = field(default_factory=dict)
    needed: frozenset[str] = frozenset()

    def called(self, number: str) -> tuple[str, ...]:
        """The names of a number in ``config.json``."""
        return self.names.get(number, (number,))

    @property
    def known(self) -> frozenset[str]:
        """All fields that may be there."""
        numbers = {name for number in fields(self.numbers) for name in self.called(number.name)}
        rope = {"model_type", "head_dim", "rope_parameters", "rope_scaling"}
        return frozenset(numbers | rope | self.one_value.keys() | NO_EFFECT.keys() | self.no_effect.keys() | {*IDS})

    @property
    def not_null(self) -> frozenset[str]:
        """Fields that may be left out, but not be null."""
        decided = {name for name, value in self.one_value.items() if value is not None}
        numbers = {name for number in fields(Architecture) for name in self.called(number.name)}
        return frozenset(numbers | decided | (NO_EFFECT.keys() - NULLABLE))


FLEX_OLMO: Final = Fields("flex_olmo", "a FlexOlmo model", ONE_VALUE, {"max_position_embeddings": 4096}, ROPE_THETA)


def read_architecture(config: Mapping[str, Any], kind: Fields = FLEX_OLMO) -> Architecture:
    """The numbers of a ``config.json``, each checked before anything is counted or multiplied with it.

    Raises:
        LayoutError: naming the first field that makes no model of this kind.
    """
    given = {name: value for name, value in config.items() if value is not None or name in kind.not_null}
    if given.get("model_type") != kind.model_type:
        raise LayoutError(f"config.json names model_type {given.get('model_type')!r:.40}, expected {kind.model_type!r}")
    if "quantization_config" in given:
        raise LayoutError("config.json is that of a quantised model; experts are made from float32 and bfloat16")
    if missing := sorted(kind.needed - given.keys()):
        raise LayoutError(f"config.json has no {missing[0]}, which {kind.name} needs")
    values = _numbers(given, kind)
    architecture = kind.numbers(**values)
    heads = architecture.num_attention_heads
    if values.get("head_dim") is None and architecture.hidden_size % (2 * heads):
        _refuse("hidden_size", architecture.hidden_size, f"a multiple of twice the {heads} attention heads")
    said = {name: value for name, value in values.items() if value is not None} | given
    _check_one_values(said, {**kind.one_value, "head_dim": architecture.head_size})
    no_effect = {**NO_EFFECT, **kind.no_effect}
    for name in sorted(given.keys() & no_effect.keys()):
        _require(name, given[name], no_effect[name])
    for name in IDS:
        if name in given:
            _check_ids(name, given[name], architecture.vocab_size)
    if unknown := sorted(given.keys() - kind.known):
        raise LayoutError(f"config.json has {unknown[0]!r:.60}, which is not a field of {kind.name}: remove it")
    return architecture


def _numbers(given: Mapping[str, Any], kind: Fields) -> dict[str, Any]:
    defaults = {**kind.defaults, "num_key_value_heads": given.get("num_attention_heads")}
    values = {}
    for number in fields(kind.numbers):
        default = defaults.get(number.name, None if number.default is MISSING else number.default)
        said = [name for name in kind.called(number.name) if name in given]
        name, value = (said[0], given[said[0]]) if said else (number.name, default)
        if number.name == "rope_theta":
            value = _theta(given, kind)
        if number.type == "int" or (number.type == "int | None" and value is not None):
            _require_size(name, value)
        elif number.type != "int | None":
            _require(name, value, NUMBER_KINDS.get(number.name, "true or false"))
        values[number.name] = value
    return values


def _theta(given: Mapping[str, Any], kind: Fields) -> Any:
    """The base of the rotary embedding, from old (``rope_theta``) or new (``rope_parameters``) configurations."""
    forms = {name: given[name] for name in ("rope_parameters", "rope_scaling") if name in given}
    found = [given["rope_theta"]] if "rope_theta" in given else []
    for name, form in forms.items():
        if not isinstance(form, Mapping):
            _refuse(name, form, "an object")
        kinds = [form[key] for key in ("rope_type", "type") if form.get(key) is not None]
        other = {key for key in form.keys() - ROPE_KEYS if key != PARTIAL or form[key] != kind.one_value.get(PARTIAL)}
        if any(name != "default" for name in kinds) or other:
            raise LayoutError(
                f"config.json asks for rotary embeddings {dict(form)!r:.80}, only the default kind is read"
            )
        found += [form["rope_theta"]] if form.get("rope_theta") is not None else []
    if any(theta != found[0] for theta in found):
        raise LayoutError(f"config.json gives rope_theta more than one value: {', '.join(f'{t!r:.40}' for t in found)}")
    return found[0] if found else kind.rope_theta


def _check_one_values(given: Mapping[str, Any], one_value: Mapping[str, Any]) -> None:
    for name, wanted in one_value.items():
        value = given.get(name, wanted)
        if type(value) is not type(wanted) or value != wanted:
            _refuse(name, value, "null" if wanted is None else repr(wanted))


def _check_ids(name: str, value: Any, vocabulary: int) -> None:
    ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
    if not ids or not all(type(id_) is int and 0 <= id_ < vocabulary for id_ in ids):
        _refuse(name, value, f"token ids below {vocabulary}")


def _require_size(name: str, value: Any) -> None:
    most = MAX_SIZE.get(name, 1 << 24)
    if not (type(value) is int and 1 <= value <= most):
        _refuse(name, value, f"1 to {most}")


def _require(name: str, value: Any, kind: str) -> None:
    if not KINDS[kind](value):
        _refuse(name, value, kind)


def _refuse(name: str, value: Any, expected: str) -> NoReturn:
    raise LayoutError(f"config.json: {name} is {value!r:.40}, expected {expected}")
