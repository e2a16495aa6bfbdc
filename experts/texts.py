"""An owner's documents from a folder of text and JSON lines.

``*.txt`` and ``*.md`` are one document each. A line of ``*.jsonl`` is ``{"text": …}`` or ``{"prompt": …, "answer":
…}``; other fields are left alone. Files are read in the order of their paths, so that the same folder is the same
training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flexgate.experts.errors import TextsInvalid

SUFFIXES: Final = (".txt", ".md", ".jsonl")


@dataclass(frozen=True)
class Document:
    """What is asked and what is answered; plain text has no prompt."""

    prompt: str
    answer: str


def read_documents(folder: Path) -> list[Document]:
    """Every document below ``folder``.

    Raises:
        TextsInvalid: no folder, no documents, undecodable text or a line that is no document, with its place.
    """
    if not folder.is_dir():
        raise TextsInvalid(f"{folder} is not a folder of texts")
    paths = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    documents = [document for path in paths for document in _read(path) if document.answer.strip()]
    if not documents:
        raise TextsInvalid(f"{folder} holds no text in {', '.join('*' + suffix for suffix in SUFFIXES)}")
    return documents


def _read(path: Path) -> Iterator[Document]:
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise TextsInvalid(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TextsInvalid(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error
    if path.suffix != ".jsonl":
        yield Document("", text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _document(line, f"{path}, line {number}")


def _document(line: str, where: str) -> Document:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TextsInvalid(f"{where} is not JSON: {error}") from error
    fields = value if isinstance(value, dict) else {}
    match fields:
        case {"text": str(text)}:
            return Document("", text)
        case {"prompt": str(prompt), "answer": str(answer)}:
            return Document(prompt, answer)
    raise TextsInvalid(f'{where} must be {{"text": "…"}} or {{"prompt": "…", "answer": "…"}}')
