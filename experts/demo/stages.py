"""Where the stages of the demo's training keep their results, and what each of them cost."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer

TOKENIZER, ANCHOR, PACKAGES, KEYS, MERGED, SECONDS = "tokenizer", "anchor", "packages", "keys", "merged", "seconds"


def read_tokenizer(work: Path) -> Tokenizer:
    """The tokenizer that was trained with the anchor."""
    return Tokenizer.from_file(str(work / TOKENIZER / "tokenizer.json"))


@contextmanager
def timed(work: Path, stage: str) -> Iterator[None]:
    """Note the processor seconds of a stage, its child processes included, when it is through."""
    before = _processor_seconds()
    yield
    path = work / SECONDS / f"{stage}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(round(_processor_seconds() - before, 1)))


def _processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def seconds(work: Path) -> dict[str, float]:
    """The processor seconds of every stage."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((work / SECONDS).glob("*.json"))}
