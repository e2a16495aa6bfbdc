"""What ``config.json`` may say of a model that tools and server compute, field by field.

A field either decides shapes or arithmetic and has one value that is computed, or decides nothing here and has a type.
Anything else is refused, because a loader may read it and compute something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
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
}
MAX_SIZE: Final[Mapping[str, int]] = {"num_hidden_layers": 1024, "num_experts": 4096, "num_experts_per_tok": 4096}
NUMBER_KINDS: Final[Mapping[str, str]] = {
    "rope_theta": "a positive number",
    "rms_norm_eps": "a positive number with a point, such as 1.0",
}
TRANSFORMERS_DEFAULTS: Final[Mapping[str, Any]] = {"max_position_embeddings": 4096}
"""Where ``config.json`` leaves out what ``Architecture`` has another default for."""
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
NOT_NULL: Final = {field.name for field in fields(Architecture)} | ONE_VALUE.keys() | NO_EFFECT.keys() - NULLABLE
ROPE_KEYS: Final = frozenset({"rope_type", "type", "rope_theta"})


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """The numbers of a ``config.json``, each checked before anything is counted or multiplied with it.

    Raises:
        LayoutError: naming the first field that makes no model of this kind.
    """
    given = {name: value for name, value in config.items() if value is not None or name in NOT_NULL}
    if given.get("model_type") != "flex_olmo":
        raise LayoutError(f"config.json names model_type {given.get('model_type')!r:.40}, expected 'flex_olmo'")
    if "quantization_config" in given:
        raise LayoutError("config.json is that of a quantised model; experts are made from float32 and bfloat16")
    values = _numbers(given)
    architecture = Architecture(**values)
    heads = architecture.num_attention_heads
    if architecture.hidden_size % (2 * heads):
        _refuse("hidden_size", architecture.hidden_size, f"a multiple of twice the {heads} attention heads")
    _check_one_values(given, architecture)
    for name in sorted(given.keys() & NO_EFFECT.keys()):
        _require(name, given[name], NO_EFFECT[name])
    for name in IDS:
        if name in given:
            _check_ids(name, given[name], architecture.vocab_size)
    known = {*values, "model_type", "head_dim", "rope_parameters", "rope_scaling", *ONE_VALUE, *NO_EFFECT, *IDS}
    if unknown := sorted(given.keys() - known):
        raise LayoutError(f"config.json has {unknown[0]!r:.60}, which is not a field of a FlexOlmo model: remove it")
    return architecture


def _numbers(given: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {**TRANSFORMERS_DEFAULTS, "num_key_value_heads": given.get("num_attention_heads")}
    values = {}
    for field in fields(Architecture):
        default = defaults.get(field.name, None if field.default is MISSING else field.default)
        value = _theta(given) if field.name == "rope_theta" else given.get(field.name, default)
        if field.type == "int":
            _require_size(field.name, value)
        else:
            _require(field.name, value, NUMBER_KINDS.get(field.name, "true or false"))
        values[field.name] = value
    return values


def _theta(given: Mapping[str, Any]) -> Any:
    """The base of the rotary embedding, from old (``rope_theta``) or new (``rope_parameters``) configurations."""
    forms = {name: given[name] for name in ("rope_parameters", "rope_scaling") if name in given}
    found = [given["rope_theta"]] if "rope_theta" in given else []
    for name, form in forms.items():
        if not isinstance(form, Mapping):
            _refuse(name, form, "an object")
        kinds = [form[key] for key in ("rope_type", "type") if form.get(key) is not None]
        if any(kind != "default" for kind in kinds) or form.keys() - ROPE_KEYS:
            raise LayoutError(
                f"config.json asks for rotary embeddings {dict(form)!r:.80}, only the default kind is read"
            )
        found += [form["rope_theta"]] if form.get("rope_theta") is not None else []
    if any(theta != found[0] for theta in found):
        raise LayoutError(f"config.json gives rope_theta more than one value: {', '.join(f'{t!r:.40}' for t in found)}")
    return found[0] if found else ROPE_THETA


def _check_one_values(given: Mapping[str, Any], architecture: Architecture) -> None:
    for name, wanted in {**ONE_VALUE, "head_dim": architecture.head_size}.items():
        value = given.get(name, wanted)
        if type(value) is not type(wanted) or value != wanted:
            _refuse(name, value, repr(wanted))


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
