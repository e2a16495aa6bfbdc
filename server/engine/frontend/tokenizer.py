"""What a model folder says of texts, checked before vLLM reads it: tokenizer, chat template, generation defaults.

Everything is read as vLLM will read it, by transformers, and what that reads twice, or drops, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flexgate.experts.checkpoint.shards import SMALL_FILES
from flexgate.server.engine.frontend.checkpoint import CheckpointError, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_CONFIG: Final = "tokenizer_config.json"
GENERATION_CONFIG: Final = "generation_config.json"
TEMPLATE_FILE: Final = "chat_template.jinja"
TEMPLATE_FOLDER: Final = "additional_chat_templates"
PROBE: Final = "a word of a user"

Rule = tuple[Callable[[Any], bool], str]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _whole(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 53


_PENALTY: Final[Rule] = (lambda v: _number(v) and -2 <= v <= 2, "a number from -2 to 2")
DEFAULTS: Final[Mapping[str, Rule]] = {
    "temperature": (lambda v: _number(v) and v >= 0, "a number of at least 0"),
    "top_p": (lambda v: _number(v) and 0 < v <= 1, "a number above 0, at most 1"),
    "top_k": (lambda v: _whole(v) and v >= -1, "a whole number, -1 or 0 for all tokens"),
    "min_p": (lambda v: _number(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "repetition_penalty": (lambda v: _number(v) and v > 0, "a number above 0"),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "max_new_tokens": (lambda v: _whole(v) and v >= 1, "a whole number of at least 1"),
}
"""Of ``generation_config.json``, what vLLM gives a request that says nothing of it."""


def require_readable_texts(folder: Path, vocabulary: int) -> None:
    """Check every small file of a model folder that has a tokenizer.

    Raises:
        CheckpointError: one sentence that names the file and what is wrong with it.
    """
    for name in SMALL_FILES:
        if name.endswith(".json") and (folder / name).is_file():
            read_object(folder / name)
    if (folder / GENERATION_CONFIG).is_file():
        _require_generation(folder / GENERATION_CONFIG, vocabulary)
    if (folder / TOKENIZER_CONFIG).is_file():
        _require_tokenizer(folder, vocabulary)


def _require_generation(path: Path, vocabulary: int) -> None:
    from transformers import GenerationConfig

    fields = {name: value for name, value in read_object(path).items() if value is not None}
    for name, (holds, expected) in DEFAULTS.items():
        if name in fields and not holds(fields[name]):
            raise CheckpointError(f"{path}: {name} is {fields[name]!r:.40}, expected {expected}")
    ends = fields.get("eos_token_id", [])
    for id_ in ends if isinstance(ends, list) else [ends]:
        if not (_whole(id_) and 0 <= id_ < vocabulary):
            raise CheckpointError(f"{path}: eos_token_id is {ends!r:.40}, expected token ids below {vocabulary}")
    _reading(path, lambda: GenerationConfig.from_pretrained(path.parent, local_files_only=True))


def _require_tokenizer(folder: Path, vocabulary: int) -> None:
    from transformers import AutoTokenizer

    path = folder / TOKENIZER_CONFIG
    fields = read_object(path)
    longest = fields.get("model_max_length")
    if longest is not None and not (_number(longest) and longest >= 1):
        raise CheckpointError(f"{path}: model_max_length is {longest!r:.40}, expected a number of at least 1")
    _require_one_template(folder, fields.get("chat_template"))
    tokenizer = _reading(
        folder, lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    )
    last = max(tokenizer.get_vocab().values(), default=-1)
    if last >= vocabulary:
        raise CheckpointError(
            f"{folder} cannot be served: its tokenizer has an id {last}, but vocab_size is {vocabulary}"
        )
    if tokenizer.chat_template and (problem := template_problem(tokenizer, None)):
        raise CheckpointError(f"{folder}: its chat template: {problem}")


def _require_one_template(folder: Path, configured: Any) -> None:
    """Refuse two places that name different templates: transformers takes one and drops the other."""
    files = {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    if (folder / TEMPLATE_FILE).is_file():
        files["default"] = folder / TEMPLATE_FILE
    if configured is None:
        return
    templates = {"default": configured}
    if isinstance(configured, list) and all(isinstance(entry, dict) for entry in configured):
        templates = {entry.get("name"): entry.get("template") for entry in configured}
    if not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise CheckpointError(
            f"{folder / TOKENIZER_CONFIG}: chat_template must be a text, or a list of names and texts"
        )
    if files and templates != {name: _text(path) for name, path in files.items()}:
        where = TEMPLATE_FILE if (folder / TEMPLATE_FILE).is_file() else TEMPLATE_FOLDER
        raise CheckpointError(f"{folder}: {TOKENIZER_CONFIG} and {where} hold different chat templates: remove one")


def _text(path: Path) -> str:
    return str(_reading(path, lambda: path.read_text(encoding="utf-8")))


def template_problem(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str | None:
    """Why a chat template, or the tokenizer's own, does not pass on what a user says; None where it does."""
    problem = None
    for content in (PROBE, [{"type": "text", "text": PROBE}]):  # vLLM gives a template whichever of the two it reads
        turn = [{"role": "user", "content": content}]
        try:
            rendered = tokenizer.apply_chat_template(turn, chat_template=template, tokenize=False)
        except Exception as error:  # a template is a program
            problem = problem or f"{type(error).__name__}: {error}"
        else:
            if PROBE in str(rendered):
                return None
            problem = problem or "a user's message is not in its output"
    return problem


def _reading(path: Path, read: Callable[[], Any]) -> Any:
    """What ``read`` gives; its mistake as one sentence."""
    try:
        return read()
    except Exception as error:  # loaders raise whatever a strange file makes them stumble over
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {reason:.300}") from error
